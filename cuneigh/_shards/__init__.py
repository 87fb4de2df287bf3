"""One layout in shards: which keys each shard's queries see, and who sends what to whom.

Pure arithmetic on integers: what moves the numbers is elsewhere, one module for a framework.
`axis` has the shards along one token axis, `plan` those of a whole layout, from one rank's side.
"""
