"""Which public names each module of ``natten`` has, in which generations."""

from __future__ import annotations

from collections.abc import Iterator

Names = list[tuple[str, str]]
"""Generations, and names that all of them have; both separated by spaces."""

_HALVES_0_14 = "natten1dav natten1dqk natten1dqkrpb natten2dav natten2dqk natten2dqkrpb"
_HALVES_0_15 = f"{_HALVES_0_14} natten3dav natten3dqk natten3dqkrpb"
_HALVES_0_17 = "na1d_av na1d_qk na2d_av na2d_qk na3d_av na3d_qk"
_SWITCHES_0_15 = """
    disable_gemm_na disable_tf32 disable_tiled_na enable_gemm_na enable_tf32 enable_tiled_na
    has_bfloat has_cuda has_fp32_gemm has_fp64_gemm has_gemm has_half has_tf32_gemm
"""
_SWITCHES_0_17 = """
    disable_autotuner force_flex_attention has_fna has_fused_na is_autotuner_enabled
    is_autotuner_enabled_for_backward is_autotuner_enabled_for_forward
    is_autotuner_thorough_for_backward is_autotuner_thorough_for_forward is_fna_enabled
    is_fused_na_enabled is_gemm_na_enabled is_tf32_in_gemm_na_enabled is_tiled_na_enabled
    use_autotuner use_flex_attention use_fna use_fused_na use_gemm_na use_tf32_in_gemm_na
    use_tiled_na
"""
_SWITCHES_SINCE_0_17 = """
    are_deterministic_algorithms_enabled get_memory_usage_preference
    is_kv_parallelism_in_fused_na_enabled is_memory_usage_default is_memory_usage_strict
    is_memory_usage_unrestricted set_memory_usage_preference use_deterministic_algorithms
    use_kv_parallelism_in_fused_na
"""
_SWITCHES_0_20 = """
    allow_flex_compile allow_flex_compile_backprop disable_flex_compile
    disable_flex_compile_backprop is_flex_compile_allowed is_flex_compile_backprop_allowed
"""
_CHECKS_0_17 = """
    check_all_args check_causal_arg check_dilation_arg check_input_size_arg check_kernel_size_arg
"""
_TYPES_0_17 = """
    NoneType Dimension1DType Dimension2DType Dimension3DType CausalArg1DType CausalArg2DType
    CausalArg3DType Dimension1DTypeOrDed Dimension2DTypeOrDed Dimension3DTypeOrDed
    CausalArg1DTypeOrDed CausalArg2DTypeOrDed CausalArg3DTypeOrDed DimensionType CausalArgType
"""
_CONFIGS_0_20 = """
    CutlassBlackwellFmhaForwardConfigType CutlassBlackwellFnaForwardConfigType
    CutlassFmhaBackwardConfigType CutlassFmhaForwardConfigType CutlassFnaBackwardConfigType
    CutlassFnaForwardConfigType CutlassHopperFmhaForwardConfigType
    CutlassHopperFnaForwardConfigType FlexFmhaForwardConfigType FlexFnaForwardConfigType
    FmhaForwardConfigType QKTileShapeType
"""
_GET_CONFIGS_0_20 = """
    get_bwd_configs_for_cutlass_fmha get_bwd_configs_for_cutlass_fna
    get_configs_for_cutlass_blackwell_fmha get_configs_for_cutlass_blackwell_fna
    get_configs_for_cutlass_fmha get_configs_for_cutlass_fna
    get_configs_for_cutlass_hopper_fmha get_configs_for_cutlass_hopper_fna
    get_configs_for_flex_fmha get_configs_for_flex_fna
"""
_GET_CONFIGS_0_21 = """
    get_bwd_configs_for_cutlass_blackwell_fmha get_bwd_configs_for_cutlass_blackwell_fna
    get_bwd_configs_for_cutlass_hopper_fmha get_bwd_configs_for_cutlass_hopper_fna
"""

NAMES: dict[str, Names] = {
    "": [
        ("0.14", "NeighborhoodAttention"),
        ("0.14 0.15 0.17 0.20 0.21", "NeighborhoodAttention1D NeighborhoodAttention2D"),
        ("0.15 0.17 0.20 0.21", "NeighborhoodAttention3D"),
        ("0.15 0.17", _SWITCHES_0_15),
        ("0.17", _SWITCHES_0_17),
        ("0.17 0.20 0.21", _SWITCHES_SINCE_0_17),
        ("0.20 0.21", "HAS_LIBNATTEN attention merge_attentions na1d na2d na3d"),
        ("0.20 0.21", _SWITCHES_0_20),
        ("0.20 0.21", _GET_CONFIGS_0_20),
        ("0.21", _GET_CONFIGS_0_21),
    ],
    "functional": [
        ("0.14", _HALVES_0_14),
        (
            "0.14",
            "NATTEN1DAVFunction NATTEN1DQKRPBFunction NATTEN2DAVFunction NATTEN2DQKRPBFunction",
        ),
        ("0.15 0.17", _HALVES_0_15),
        ("0.15 0.17", _HALVES_0_17),
        ("0.15", "na1d_qk_with_bias na2d_qk_with_bias na3d_qk_with_bias get_device_cc"),
        ("0.15", _SWITCHES_0_15),
        (
            "0.15 0.17",
            """
            NeighborhoodAttention1DAVAutogradFunction NeighborhoodAttention1DQKAutogradFunction
            NeighborhoodAttention2DAVAutogradFunction NeighborhoodAttention2DQKAutogradFunction
            NeighborhoodAttention3DAVAutogradFunction NeighborhoodAttention3DQKAutogradFunction
            """,
        ),
        (
            "0.17",
            """
            FusedNeighborhoodAttention1D FusedNeighborhoodAttention2D FusedNeighborhoodAttention3D
            """,
        ),
        ("0.17 0.20 0.21", "na1d na2d na3d"),
        ("0.20 0.21", "attention merge_attentions neighborhood_attention_generic"),
    ],
    "modules": [
        (
            "0.20 0.21",
            """
            NeighborhoodAttention1D NeighborhoodAttention2D NeighborhoodAttention3D
            NeighborhoodAttentionGeneric
            """,
        ),
    ],
    "na1d": [("0.17", "NeighborhoodAttention1D na1d na1d_av na1d_qk")],
    "na2d": [("0.17", "NeighborhoodAttention2D na2d na2d_av na2d_qk")],
    "na3d": [("0.17", "NeighborhoodAttention3D na3d na3d_av na3d_qk")],
    "nattencuda": [("0.14", "NeighborhoodAttention")],
    "nattencuda1d": [("0.14", "NeighborhoodAttention1D natten1dav natten1dqkrpb")],
    "nattencuda2d": [("0.14", "NeighborhoodAttention2D natten2dav natten2dqkrpb")],
    "natten1d": [
        ("0.14 0.15 0.17", "NeighborhoodAttention1D"),
        ("0.14", "natten1dav natten1dqkrpb"),
        ("0.15", "na1d_av na1d_qk_with_bias"),
    ],
    "natten2d": [
        ("0.14", "NeighborhoodAttention natten2dav natten2dqkrpb"),
        ("0.14 0.15 0.17", "NeighborhoodAttention2D"),
        ("0.15", "na2d_av na2d_qk_with_bias"),
    ],
    "natten3d": [
        ("0.15 0.17", "NeighborhoodAttention3D"),
        ("0.15", "na3d_av na3d_qk_with_bias"),
    ],
    "context": [
        ("0.17", _SWITCHES_0_15),
        ("0.17", _SWITCHES_0_17),
        ("0.17", "AutotunerContext should_force_flex_attention should_use_flex_attention"),
        ("0.17 0.20 0.21", _SWITCHES_SINCE_0_17),
        ("0.17 0.20 0.21", "MemoryUsagePreference NattenContext"),
        ("0.20 0.21", _SWITCHES_0_20),
    ],
    "experimental": [("0.17", "na1d na2d na3d")],
    "flops": [
        ("0.14 0.15 0.17", "add_natten_handle get_flops"),
        ("0.14", "av_flop qk_rpb_flop"),
        ("0.14 0.15 0.17", "av_1d_flop qk_1d_rpb_flop"),
        ("0.15 0.17", "av_2d_flop av_3d_flop qk_2d_rpb_flop qk_3d_rpb_flop"),
        ("0.17", "fna_flop_count has_fvcore na_av_flop_count na_qk_flop_count"),
    ],
    "types": [
        ("0.17 0.20 0.21", _TYPES_0_17),
        ("0.17", "FnaBackwardConfigType FnaForwardConfigType FnaTileShapeType ListOrNestedTensor"),
        ("0.17", "create_causal_arg_from_bool create_dim_from_int"),
        ("0.20 0.21", "CausalArgTypeOrDed DimensionTypeOrDed KernelSchedule"),
        ("0.20 0.21", _CONFIGS_0_20),
        (
            "0.21",
            """
            CutlassBlackwellFmhaBackwardConfigType CutlassBlackwellFnaBackwardConfigType
            CutlassHopperFmhaBackwardConfigType CutlassHopperFnaBackwardConfigType
            """,
        ),
    ],
    "utils": [
        ("0.15", "NoneType"),
        (
            "0.15 0.17",
            "check_additional_keys check_additional_values make_attn_tensor_from_input",
        ),
        ("0.17", _CHECKS_0_17),
        (
            "0.17",
            """
            check_backward_tiling_config check_tiling_config get_device_cc get_num_na_weights
            """,
        ),
    ],
    "utils.checks": [
        ("0.17 0.20 0.21", _CHECKS_0_17),
        ("0.17", "check_backward_tiling_config check_tiling_config get_num_na_weights"),
        ("0.20 0.21", "check_stride_arg"),
        (
            "0.20 0.21",
            """
            additional_kv_tensor_checks check_args_against_input check_kernel_schedule
            check_tile_shape fmha_tensor_checks is_self_attention log_or_raise_error
            na_tensor_checks
            """,
        ),
        ("0.21", "varlen_tensor_checks"),
    ],
    "utils.log": [("0.17 0.20 0.21", "LogLevel get_logger log_format"), ("0.21", "NattenLogger")],
    "utils.misc": [("0.17", "get_device_cc")],
    "utils.device": [("0.20 0.21", "get_device_cc is_cpu is_cuda is_rocm")],
    "utils.dtype": [("0.21", "is_fp8 is_full is_half")],
    "utils.tensor": [
        (
            "0.15 0.17 0.20 0.21",
            "check_additional_keys check_additional_values make_attn_tensor_from_input",
        ),
    ],
    "utils.tuples": [
        (
            "0.20 0.21",
            "ceil_div_int ceil_div_tuple create_causal_arg_from_bool create_dim_from_int",
        ),
        ("0.21", "mul_tuple sub_tuple"),
    ],
    "utils.typing": [("0.15", "NoneType")],
    "utils.varlen": [("0.21", "generate_varlen_parameters")],
    "version": [("0.20 0.21", "__version__")],
    "attn_merge": [
        ("0.20", "maybe_torch_compile merge_attentions_compile merge_attentions_fn"),
        ("0.21", "MergeAttentionsAutogradFn merge_attentions"),
    ],
    "autotuner": [("0.17", "autotune_fna")],
    "backends": [
        (
            "0.20 0.21",
            """
            choose_backend choose_fmha_backend get_compatible_backends get_compatible_fmha_backends
            can_run_cutlass_blackwell_fmha can_run_cutlass_blackwell_fna can_run_cutlass_fmha
            can_run_cutlass_fna can_run_cutlass_hopper_fmha can_run_cutlass_hopper_fna
            can_run_flex_attention cutlass_blackwell_fmha cutlass_blackwell_fna_generic
            cutlass_fmha cutlass_fna_generic cutlass_hopper_fmha cutlass_hopper_fna_generic
            flex_fmha flex_fna_generic
            na1d_cutlass_blackwell_fna na1d_cutlass_fna na1d_cutlass_hopper_fna na1d_flex
            na2d_cutlass_blackwell_fna na2d_cutlass_fna na2d_cutlass_hopper_fna na2d_flex
            na3d_cutlass_blackwell_fna na3d_cutlass_fna na3d_cutlass_hopper_fna na3d_flex
            """,
        ),
        ("0.20 0.21", _GET_CONFIGS_0_20),
        ("0.21", _GET_CONFIGS_0_21),
    ],
    "flex": [
        (
            "0.17",
            """
            can_run_flex_attention flex_na1d flex_na2d flex_na3d get_flex_attention_compiled
            get_na_flex_mask
            """,
        ),
    ],
    "nested": [
        (
            "0.15 0.17",
            """
            na1d_av_nested na1d_qk_nested na2d_av_nested na2d_qk_nested na3d_av_nested
            na3d_qk_nested
            """,
        ),
    ],
    "ops": [
        ("0.15 0.17", "av_cross_backward av_cross_forward qk_cross_backward qk_cross_forward"),
        ("0.17", "additional_sdpa maybe_torch_compile merge_attentions"),
    ],
    "token_permute": [
        (
            "0.20",
            """
            DISABLE_PADDING_WARNING TOKEN_PERMUTE_PADDING_RATIO_LIMIT_UNTIL_WARNING
            maybe_pad maybe_unpad token_permute token_unpermute
            """,
        ),
        ("0.21", "token_permute_operation token_unpermute_operation"),
    ],
}
"""By the name below ``natten``. Not all releases of a generation have all of its names. What serves
NATTEN's own tests, profiler and build is left out."""


def names_of(module: str, generation: str | None) -> Iterator[str]:
    """The names of a module in `generation`, or in any."""
    for generations, names in NAMES[module]:
        if generation is None or generation in generations.split():
            yield from names.split()
