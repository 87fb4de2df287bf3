"""What the ranks of `helpers.ranks` run: all ranks of a suite call the same function."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import cuneigh
import cuneigh.torch
from cuneigh._call import WITH_KEY_GRADIENTS
from cuneigh.torch import distributed
from cuneigh.torch.distributed import _attention, _keys, _task

WHOLE = {1: cuneigh.na1d, 2: cuneigh.na2d, 3: cuneigh.na3d}
SHARDED = {1: distributed.na1d, 2: distributed.na2d, 3: distributed.na3d}


class Case(NamedTuple):
    """A layout, how it is cut, and a call."""

    layout: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...]
    parameters: dict[str, Any]
    heads: tuple[int, int]
    has_rpb: bool
    additional: int | None
    has_mask: bool


def draw_axis(draw: random.Random) -> tuple[int, dict[str, Any]]:
    """A layout and a legal window along one axis."""
    border = draw.choice(["shift", "cut", "wrap"])
    dilation = draw.choice([1, 1, 2, 3])
    groups = draw.randint(1, 6)
    layout = groups * dilation + (0 if border == "wrap" else draw.randrange(dilation))
    kernel_size = draw.randint(1, groups + 2 * (border == "cut"))
    stride = draw.choice([1, draw.randint(1, kernel_size)])
    is_causal = border != "wrap" and draw.random() < 0.3
    return layout, {
        "kernel_size": kernel_size,
        "stride": stride,
        "dilation": dilation,
        "is_causal": is_causal,
        "border": border,
    }


def cut(draw: random.Random, layout: int, count: int) -> tuple[int, ...]:
    """Shards of any sizes, now and then empty."""
    cuts = sorted(draw.randint(0, layout) for _ in range(count - 1))
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, layout], strict=True))


def draw_case(draw: random.Random, grid: tuple[int, ...]) -> Case:
    axes = [draw_axis(draw) for _ in grid]
    layout = tuple(length for length, _ in axes)
    parameters = {name: tuple(of[name] for _, of in axes) for name in axes[0][1]}
    has_rpb = max(parameters["stride"]) == 1 and not any(parameters["is_causal"])
    return Case(
        layout,
        tuple(cut(draw, length, count) for length, count in zip(layout, grid, strict=True)),
        parameters,
        draw.choice([(2, 2), (4, 2), (3, 1)]),
        has_rpb and draw.random() < 0.7,
        draw.choice([None, None, 0, 2]),
        draw.random() < MASKS,
    )


def arrays_of(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Those of the whole layout, alike on all ranks."""
    torch.manual_seed(hash((case.layout, case.sizes)) % 1000)
    (heads, kv_heads), batch, dim, value_dim = case.heads, 1 + sum(case.layout) % 2, 3, 2
    arrays = {
        "query": torch.randn(batch, *case.layout, heads, dim),
        "key": torch.randn(batch, *case.layout, kv_heads, dim),
        "value": torch.randn(batch, *case.layout, kv_heads, value_dim),
    }
    if case.has_rpb:
        arrays["rpb"] = torch.randn(heads, *(2 * k - 1 for k in case.parameters["kernel_size"]))
    if case.additional is not None:
        arrays["additional_keys"] = torch.randn(batch, case.additional, kv_heads, dim)
        arrays["additional_values"] = torch.randn(batch, case.additional, kv_heads, value_dim)
    arrays = {name: array.to(DEVICE, dtype) for name, array in arrays.items()}
    if case.has_mask:
        arrays["key_mask"] = (torch.rand(batch, *case.layout) < 0.7).to(DEVICE)
    return arrays


SHARED = "rpb", "additional_keys", "additional_values"


def check(
    case: Case, sharding: distributed.Sharding, place: tuple[int, ...], call: Any = None
) -> None:
    """A sharded call, and all of its gradients, against one of the whole layout."""
    arrays, rank = arrays_of(case), len(case.layout)
    box = tuple(
        slice(sum(sizes[:shard]), sum(sizes[: shard + 1]))
        for sizes, shard in zip(case.sizes, place, strict=True)
    )
    mine = (slice(None), *box)
    local = {
        name: (array if name in SHARED else array[mine]).clone() for name, array in arrays.items()
    }
    for given in (arrays, local):
        for name, array in given.items():
            array.requires_grad_(name != "key_mask")
    expected = WHOLE[rank](**arrays, **case.parameters, return_lse=True)
    call = call or SHARDED[rank]
    got = call(**local, **case.parameters, return_lse=True, sharding=sharding)
    incoming = [torch.randn_like(one) for one in expected]
    for one, gradient in zip(expected, incoming, strict=True):
        gradient[one.isinf()] = 0
    differentiate(expected, incoming)
    differentiate(got, [one[mine] for one in incoming])
    for one, whole in zip(got, expected, strict=True):
        close(one, whole[mine], case)
    for name, array in local.items():
        if name == "key_mask":
            continue
        gradient = array.grad
        if name in SHARED:
            dist.all_reduce(gradient)
        whole = arrays[name].grad
        close(gradient, whole if name in SHARED else whole[mine], (case, name))


def differentiate(results: Any, incoming: Any) -> None:
    torch.autograd.backward(tuple(results), tuple(incoming))


def close(got: torch.Tensor, expected: torch.Tensor, what: Any, tolerance: float = 1e-12) -> None:
    assert got.shape == expected.shape, (what, got.shape, expected.shape)
    torch.testing.assert_close(
        got, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}\n{text}"
    )


def grids(world: int) -> list[tuple[tuple[int, ...], DeviceMesh]]:
    """Meshes of all ranks for layouts of one to three token axes."""
    if world < 4:
        flat = init_device_mesh(DEVICE, (world,), mesh_dim_names=("x",))
        return [((world,), flat), ((1, world), flat), ((world, 1), flat)]
    # A mesh may have its ranks in any order.
    flat = DeviceMesh(DEVICE, [2, 0, 3, 1], mesh_dim_names=("x",))
    square = DeviceMesh(DEVICE, [[3, 1], [0, 2]], mesh_dim_names=("x", "y"))
    return [((4,), flat), ((2, 2), square), ((2, 1, 2), square)]


def mesh_axes(grid: tuple[int, ...]) -> tuple[str | None, ...]:
    names = iter("xy")
    return tuple(None if count == 1 else next(names) for count in grid)


def plain(rank: int, world: int) -> None:
    """Plain tensors of any sizes of shards, with every window, border and operand.

    Ranks compute in pieces or not as they like.
    """
    draw, mine = random.Random(world), random.Random(rank)
    nothing_to_send(grids(world)[0][1], world)
    for grid, mesh in grids(world):
        here = dict(zip("xy", mesh.get_coordinate(), strict=False))
        place = tuple(0 if name is None else here[name] for name in mesh_axes(grid))
        for _ in range(EXAMPLES):
            case = draw_case(draw, grid)
            _task.WORTH_SPLITTING = mine.choice([0, 10**11])
            _attention.BACKWARD = mine.choice([BACKWARD, EARLY])
            check(case, distributed.Sharding(mesh, mesh_axes(grid), sizes=case.sizes), place)


def early(call: Any) -> Any:
    """A backward whose gradients of keys are known first, as on a GPU."""

    def backward(*arrays: Any, **named: Any) -> Any:
        made = call(*arrays, **named)
        WITH_KEY_GRADIENTS.get()(made)
        return made

    return backward


BACKWARD = _attention.BACKWARD
EARLY = {rank: early(call) for rank, call in BACKWARD.items()}


def nothing_to_send(mesh: DeviceMesh, world: int) -> None:
    """Blocked windows that end where shards do: no rank waits for another."""
    sharding = distributed.Sharding(mesh, ("x",), layout=(6 * world,))
    query = torch.ones(1, 6, 1, 4, device=DEVICE, requires_grad=True)
    exchange, _keys.Exchange = _keys.Exchange, None
    try:
        distributed.na1d(query, query, query, 3, stride=3, sharding=sharding).sum().backward()
    finally:
        _keys.Exchange = exchange


def halves(rank: int, world: int) -> None:
    """Half precision, by the kernels of large layouts: in pieces, and by one call for a rank."""
    (_, mesh), *_ = grids(world)
    sizes = tuple(26 + 12 * shard for shard in range(world))
    torch.manual_seed(0)
    shape = (1, sum(sizes), 48, 2, 64)
    whole = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)]
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    expected = gradients(cuneigh.na2d, whole, kernel_size=(9, 7))
    sharding = distributed.Sharding(mesh, ("x", None), sizes=(sizes, None))
    for _task.WORTH_SPLITTING in (0, 10**11):
        local = [array[:, mine].clone() for array in whole]
        made = gradients(distributed.na2d, local, kernel_size=(9, 7), sharding=sharding)
        for got, one in zip(made, expected, strict=True):
            close(got, one[:, mine], _task.WORTH_SPLITTING, 2**-6)


def gradients(call: Any, arrays: list[torch.Tensor], **parameters: Any) -> list[torch.Tensor]:
    """The output, and the gradients of query, key and value for the gradient of the output."""
    *inputs, incoming = arrays
    output = call(*(array.requires_grad_() for array in inputs), **parameters)
    return [output, *torch.autograd.grad(output, inputs, incoming)]


# DTensor


def draw_placements(
    draw: random.Random, case: Case, mesh: DeviceMesh
) -> dict[str, tuple[Any, ...]]:
    """Legal ones for every argument."""
    rank, (heads, kv_heads) = len(case.layout), case.heads
    tokens: dict[str, int] = {f"token {axis}": 1 + axis for axis in range(rank)}
    of_query = {"batch": 0, "heads": 1 + rank, **tokens}
    of_mask = {"batch": 0, **tokens}
    of_extra = {"batch": 0, "heads": 2}
    axes = dict.fromkeys(("query", "key", "value"), of_query)
    axes |= {"additional_keys": of_extra, "additional_values": of_extra}
    axes |= {"rpb": {"heads": 0}, "key_mask": of_mask}
    placements: dict[str, list[Any]] = {name: [] for name in axes}
    roles = [draw.choice([None, "batch", "heads", *tokens, *tokens]) for _ in range(mesh.ndim)]
    for role, count in zip(roles, mesh.shape, strict=True):
        uneven = role == "heads" and (heads % count or kv_heads % count or roles.count("heads") > 1)
        is_replicated = role == "heads" and draw.random() < 0.5
        for name, of in axes.items():
            cut = role in of and not (name != "query" and (is_replicated or draw.random() < 0.2))
            if uneven and name not in ("query", "rpb"):
                cut = False
            cut = cut and not any(
                before == role and type(placement) is Replicate
                for before, placement in zip(roles, placements[name], strict=False)
            )
            placements[name].append(Shard(of[role]) if cut else Replicate())
    return {name: tuple(of) for name, of in placements.items()}


def check_dtensor(
    case: Case, mesh: DeviceMesh, placements: dict[str, tuple[Any, ...]], call: Any = None
) -> None:
    arrays, rank, what = arrays_of(case), len(case.layout), (case, placements)
    cut = {
        name: distribute_tensor(array, mesh, placements[name], src_data_rank=None)
        for name, array in arrays.items()
    }
    for given in (arrays, cut):
        for name in given:
            given[name] = given[name].detach().requires_grad_(name != "key_mask")
    expected = WHOLE[rank](**arrays, **case.parameters, return_lse=True)
    call = call or SHARDED[rank]
    got = call(**cut, **case.parameters, return_lse=True)
    incoming = [torch.randn_like(one) for one in expected]
    for one, gradient in zip(expected, incoming, strict=True):
        gradient[one.isinf()] = 0
    differentiate(expected, incoming)
    given = [
        distribute_tensor(one, mesh, placements["query"], src_data_rank=None) for one in incoming
    ]
    differentiate(got, given)
    for one, whole in zip(got, expected, strict=True):
        assert one.placements == placements["query"]
        close(one.full_tensor(), whole, what)
    for name, array in cut.items():
        if name != "key_mask":
            close(array.grad.full_tensor(), arrays[name].grad, (name, what))


def dtensor(rank: int, world: int) -> None:
    """DTensor, whose shards are those of torch.chunk, cut in every way."""
    draw = random.Random(10 + world)
    shape = (world,) if world < 4 else (2, 2)
    mesh = init_device_mesh(DEVICE, shape, mesh_dim_names=("x", "y")[: len(shape)])
    for _ in range(EXAMPLES * 2):
        case = draw_case(draw, (1,) * draw.choice([1, 1, 2]))
        check_dtensor(case, mesh, draw_placements(draw, case, mesh))
    refused_placements(init_device_mesh(DEVICE, (world,)))


def refused_placements(mesh: DeviceMesh) -> None:
    """What nothing but a gather would serve."""

    ones = torch.ones(2, 8, 8, 4, device=DEVICE)

    def attend(of_query: Any, of_key: Any, heads: int = 4, kv_heads: int = 4) -> Any:
        query, key = (
            distribute_tensor(ones[:, :, :count], mesh, [placement], src_data_rank=None)
            for count, placement in ((heads, of_query), (kv_heads, of_key))
        )
        return distributed.na1d(query, key, key, 3)

    axis = "along axis 0 of the mesh"
    for given, expected in [
        ((Shard(3), Replicate()), f"query has placement S(3) {axis}, but Replicate(), or Shard of"),
        ((Replicate(), Shard(1)), f"key has placement S(1) {axis}, along which query has R:"),
        ((Shard(1), Shard(0)), "Shard(1) or Replicate() is needed"),
        ((Shard(2), Shard(2), 8, 1), "key is sharded on its heads along axis 0 of the mesh, and"),
    ]:
        message = raised(lambda given=given: attend(*given))
        assert message.startswith("ValueError: na1d: "), message
        assert expected in message, message
    mixed = distribute_tensor(ones, mesh, [Shard(1)], src_data_rank=None)
    message = raised(lambda: distributed.na1d(mixed, ones, mixed, 3))
    assert message.startswith("TypeError: na1d: key is of type torch.Tensor beside"), message


# Around other parts of PyTorch


def compiled(rank: int, world: int) -> None:
    """Programs of torch.compile without a graph break."""
    (_, mesh), *_ = grids(world)
    case = fixed_case(world)
    recomputed(mesh)
    call = torch.compile(SHARDED[2], fullgraph=True, backend="aot_eager")
    check(case, distributed.Sharding(mesh, ("x", None), sizes=case.sizes), (rank, 0), call)
    placements = {name: (Replicate() if name in SHARED else Shard(1),) for name in arrays_of(case)}
    check_dtensor(case, mesh, placements, call)


def fixed_case(world: int) -> Case:
    """Windows that cross the borders of uneven shards, and every operand."""
    window = {"kernel_size": (3, 2), "stride": 1, "dilation": (2, 1), "is_causal": False}
    sizes = (tuple(range(2, 2 + world)), (5,))
    layout = tuple(map(sum, sizes))
    return Case(layout, sizes, {**window, "border": ("cut", "shift")}, (4, 2), True, 2, MASKS > 0)


def recomputed(mesh: DeviceMesh) -> None:
    """A call that is made again in the backward pass, and one whose gradient is differentiated."""
    query = torch.randn(1, 4, 2, 4, dtype=torch.float64).to(DEVICE).requires_grad_()
    sharding = distributed.Sharding(mesh, ("x",))

    def attend(query: torch.Tensor) -> torch.Tensor:
        return distributed.na1d(query, query, query, 3, sharding=sharding).square().sum()

    (kept,) = torch.autograd.grad(attend(query), query)
    again = torch.utils.checkpoint.checkpoint(attend, query, use_reentrant=False)
    close(torch.autograd.grad(again, query)[0], kept, "checkpoint")
    (gradient,) = torch.autograd.grad(attend(query), query, create_graph=True)
    message = raised(gradient.sum().backward)
    assert "na1d_backward: calls on shards have derivatives of first order only" in message, message


def modules(rank: int, world: int) -> None:
    """A module on a mesh beside one of the whole layout; alone, in DDP and in FSDP2."""
    (_, mesh), *_ = grids(world)
    parameters_in_shards(mesh)
    sizes = tuple(range(2, 2 + world))
    sharding = distributed.Sharding(mesh, ("x", None), sizes=(sizes, None))
    torch.manual_seed(0)
    x = torch.randn(2, sum(sizes), 4, 8, dtype=torch.float64).to(DEVICE)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))

    def module_of(**given: Any) -> torch.nn.Module:
        own = {"kernel_size": 3, "rel_pos_bias": True, **given}
        return cuneigh.torch.NeighborhoodAttention2D(8, 2, **own).to(DEVICE, torch.float64)

    whole = module_of()
    expected = whole(x)
    expected.square().sum().backward()
    for wrap in (None, DistributedDataParallel, fully_shard):
        sharded = module_of(sharding=sharding)
        sharded.load_state_dict(whole.state_dict())
        module = sharded
        if wrap is not None:
            module = wrap(sharded, **({"mesh": mesh} if wrap is fully_shard else {}))
        for _ in range(2):
            module.zero_grad()
            got = module(x[:, mine])
            close(got, expected[:, mine], wrap)
            got.square().sum().backward()
        for name, parameter in sharded.named_parameters():
            gradient = parameter.grad
            if wrap is None:
                dist.all_reduce(gradient)
            else:  # which both take the mean over the ranks
                gradient = gradient.full_tensor() if wrap is fully_shard else gradient
                gradient = gradient * world
            close(gradient, whole.get_parameter(name).grad, (wrap, name))


def parameters_in_shards(mesh: DeviceMesh) -> None:
    """FSDP2 of a module that has the whole layout on every rank."""
    torch.manual_seed(0)
    module = cuneigh.torch.NeighborhoodAttention1D(8, 2, 3, rel_pos_bias=True).to(DEVICE)
    x = torch.randn(1, 6, 8).to(DEVICE)
    module(x).square().mean().backward()
    wanted = {name: parameter.grad for name, parameter in module.named_parameters()}
    fully_shard(module, mesh=mesh)
    for _ in range(2):  # parameters are freed, and gathered again
        module.zero_grad()
        module(x).square().mean().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), wanted[name])


def raised(call: Any) -> str:
    """The error of a call, with its type."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


EXAMPLES = 2
MASKS = 0.3
DEVICE = "cpu"
"""Where arrays are: there, or "cuda" with a GPU for each rank."""
