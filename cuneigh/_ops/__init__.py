"""The public functions; `compute` is behind all of them but `merge_attentions`."""
