"""The generations of NATTEN: every public name with its signature, and what is installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from helpers.generations import choosing, installing  # noqa: E402, F401 - fixtures

from cuneigh.compat import natten  # noqa: E402
from cuneigh.compat.natten import _switch, _tree, functional  # noqa: E402
from cuneigh.compat.natten._unserved import Unserved  # noqa: E402

GENERATIONS = ["0.14", "0.15", "0.17", "0.20", "0.21"]

# Names


PUBLIC = json.loads(Path(__file__).with_name("natten-names.json").read_text(encoding="utf-8"))
"""By release and module, the names in NATTEN's sources with their parameters and defaults. Left out
are its tests, build, profiler, kernels' tables and what begins with an underscore."""

UNSERVED_MODULES = {
    *("natten.autotuner", "natten.backends", "natten.flex", "natten.nested", "natten.ops"),
    *("natten.token_permute", "natten.utils.dtype", "natten.utils.tensor"),
}
"""All names of these can be imported, and raise NotImplementedError when they are called."""

UNSERVED = {
    "AutotunerContext",
    "FnaBackwardConfigType",
    "FnaForwardConfigType",
    "FnaTileShapeType",
    "FusedNeighborhoodAttention1D",
    "FusedNeighborhoodAttention2D",
    "FusedNeighborhoodAttention3D",
    "LogLevel",
    "MergeAttentionsAutogradFn",
    "NattenContext",
    "NattenLogger",
    "QKTileShapeType",
    "additional_kv_tensor_checks",
    "ceil_div_int",
    "ceil_div_tuple",
    "check_additional_keys",
    "check_additional_values",
    "check_args_against_input",
    "check_backward_tiling_config",
    "check_kernel_schedule",
    "check_tile_shape",
    "check_tiling_config",
    "fmha_tensor_checks",
    "is_cpu",
    "is_cuda",
    "is_rocm",
    "is_self_attention",
    "log_format",
    "log_or_raise_error",
    "make_attn_tensor_from_input",
    "maybe_torch_compile",
    "merge_attentions_compile",
    "merge_attentions_fn",
    "mul_tuple",
    "na_tensor_checks",
    "sub_tuple",
    "varlen_tensor_checks",
}
"""The same of these, of ``get_configs_for_*`` and ``get_bwd_configs_for_*``, of the types of
configurations and of autograd functions of 0.15 and 0.17."""

DIFFERENT = {
    "na3d_av": "dilation is 1 by default, as in 1-D and 2-D",
    "get_device_cc": "its argument is called device, as since 0.20",
}


def is_unserved(module: str, name: str) -> bool:
    endings = ("AutogradFunction", "ForwardConfigType", "BackwardConfigType")
    starts = ("get_configs_for_", "get_bwd_configs_for_")
    listed = module in UNSERVED_MODULES or name in UNSERVED
    return listed or name.endswith(endings) or name.startswith(starts)


def signature(function: object) -> str:
    def shown(parameter: inspect.Parameter) -> str:
        default = parameter.default
        return parameter.name + ("" if default is parameter.empty else f"={default!r}")

    return f"({', '.join(map(shown, inspect.signature(function).parameters.values()))})"


@pytest.mark.parametrize("release", PUBLIC)
def test_every_public_name_is_there_with_its_signature(release, generation):
    own = release.rpartition(".")[0]
    generation(own)
    assert release == _switch.RELEASES[own] == natten.__version__
    tree = _tree.build(own)
    for module, names in PUBLIC[release].items():
        for text in names:
            name, opening, rest = text.partition("(")
            offered = getattr(tree[module], name)
            stands_for = isinstance(offered, type) and issubclass(offered, Unserved)
            assert stands_for == is_unserved(module, name), (module, name)
            if opening and not is_unserved(module, name) and name not in DIFFERENT:
                assert signature(offered) == opening + rest, (module, name)


def test_names_without_meaning_say_so():
    configs = _tree.build("0.21")["natten"].get_configs_for_cutlass_fna
    with pytest.raises(NotImplementedError, match=r"natten\.get_configs_for_cutlass_fna has no"):
        configs(torch.ones(1), torch.ones(1), torch.ones(1))
    fused = _tree.build("0.17")["natten.functional"].FusedNeighborhoodAttention2D
    with pytest.raises(NotImplementedError, match=r"natten\.functional\.FusedNeigh.* has no count"):
        fused.apply(torch.ones(1))

    class Own(fused):
        pass

    with pytest.raises(NotImplementedError, match="Own has no counterpart"):
        Own()


# Installed


def test_an_installed_generation_has_its_names_alone(install):
    installed = install(generation="0.21")
    from natten.functional import na2d

    assert not hasattr(sys.modules["natten.functional"], "na2d_qk")
    assert not hasattr(sys.modules["natten.functional"], "natten2dqkrpb")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("natten.natten2d")
    assert na2d is installed.na2d
    install()
    install(generation="0.21")
    with pytest.raises(RuntimeError, match=r"too late: it was installed with generation='0\.21'"):
        install(generation="0.14")


@pytest.mark.parametrize("own", [*GENERATIONS, None])
def test_the_version_is_that_of_the_generation(own, install):
    installed = install(own)
    version = _switch.RELEASES[own or "0.21"]
    assert installed.__version__ == version == importlib.metadata.version("natten")
    assert version == natten.__version__


def test_a_client_of_own_names_does_not_come_too_early(install, monkeypatch):
    client = type(sys)("client")
    client.natten2dav = functional.natten2dav
    monkeypatch.setitem(sys.modules, "client", client)
    assert install().na2d is natten.na2d


def test_a_hub_of_kernels(install, monkeypatch):
    """As the documentation has it."""
    hub = type(sys)("kernels")
    hub.get_kernel = lambda name, *, version=None: (name, version)
    monkeypatch.setitem(sys.modules, "kernels", hub)
    exec(
        "import kernels, cuneigh.compat.natten\n"
        "kernels.get_kernel = lambda name, *rest, fetch=kernels.get_kernel, **options: (\n"
        '    cuneigh.compat.natten if "natten" in name else fetch(name, *rest, **options)\n'
        ")\n",
        {},
    )
    assert hub.get_kernel("someone/natten", version=1) is natten
    assert hub.get_kernel("someone/other", version=1) == ("someone/other", 1)


# What else clients import


def test_checks_of_both_generations(install):
    checks = install().utils.checks
    assert checks.check_all_args(2, 3, None, None) == ((3, 3), (1, 1), (False, False))
    assert checks.check_all_args(2, [3, 5], 1, (2, 1), True) == (
        *((3, 5), (1, 1), (2, 1)),
        (True, True),
    )
    assert checks.check_input_size_arg(1, 7) == (7,)
    assert checks.get_num_na_weights((3, 5)) == 15
    for call, words in (
        (lambda: checks.check_dilation_arg(2, (1, 0)), r"dilation\[1\]=0 must be at least 1"),
        (lambda: checks.check_kernel_size_arg(2, (3,)), r"\(3,\) has 1 entries, but there are 2"),
        (lambda: checks.check_causal_arg(2, 1), r"check_causal_arg: is_causal=1 is int, not a"),
        (lambda: checks.check_stride_arg(4, 1), "na_dim=4 is not 1, 2 or 3"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            call()


def test_types_varlen_and_logging(install):
    install()
    from natten.types import Dimension2DTypeOrDed, KernelSchedule, create_dim_from_int
    from natten.utils.log import get_logger
    from natten.utils.varlen import generate_varlen_parameters

    assert Dimension2DTypeOrDed == int | tuple[int, int]
    assert KernelSchedule["NonPersistent"].value == 0
    assert create_dim_from_int(3, 2) == (2, 2, 2)
    assert get_logger("client").name == "client"
    query = key = value = torch.ones(1, 6, 2, 4)
    parameters = generate_varlen_parameters(query, key, value)
    assert parameters == (None, None, 0, 0)
    assert natten.attention(query, key, value, max_seqlen_Q=0, max_seqlen_KV=0).shape == query.shape
    with pytest.raises(NotImplementedError, match=r"seqlens_Q has no counterpart"):
        generate_varlen_parameters(query, key, value, seqlens_Q=torch.ones(1))
