"""The rules, one a file."""

from ampcheck.rules.autocast_around_backward import autocast_around_backward
from ampcheck.rules.autocast_bad_argument import autocast_bad_argument
from ampcheck.rules.autocast_cache_under_no_grad import autocast_cache_under_no_grad
from ampcheck.rules.autocast_captured_in_trace import autocast_captured_in_trace
from ampcheck.rules.autocast_dtype_differs import autocast_dtype_differs
from ampcheck.rules.autocast_not_active import autocast_not_active
from ampcheck.rules.autocast_wrong_device import autocast_wrong_device
from ampcheck.rules.backward_hook_on_in_place import backward_hook_on_in_place
from ampcheck.rules.buffers_rewritten_between_forwards import buffers_rewritten_between_forwards
from ampcheck.rules.clip_before_unscale import clip_before_unscale
from ampcheck.rules.constant_baked_into_trace import constant_baked_into_trace
from ampcheck.rules.constant_lost import constant_lost
from ampcheck.rules.custom_function_without_cast import custom_function_without_cast
from ampcheck.rules.deprecated_amp_api import deprecated_amp_api
from ampcheck.rules.double_precision import double_precision
from ampcheck.rules.dtype_mismatch import dtype_mismatch
from ampcheck.rules.ema_low_precision import ema_low_precision
from ampcheck.rules.export_differs import export_differs
from ampcheck.rules.export_failed import export_failed
from ampcheck.rules.first_step_skipped import first_step_skipped
from ampcheck.rules.float32_diverges_too import float32_diverges_too
from ampcheck.rules.fully_masked_softmax import fully_masked_softmax
from ampcheck.rules.fused_optimizer_clipping import fused_optimizer_clipping
from ampcheck.rules.gradients_underflow import gradients_underflow
from ampcheck.rules.graph_freed_or_detached import graph_freed_or_detached
from ampcheck.rules.in_place_dtype import in_place_dtype
from ampcheck.rules.inference_tensor_in_autograd import inference_tensor_in_autograd
from ampcheck.rules.input_not_finite import input_not_finite
from ampcheck.rules.internal_error import internal_error
from ampcheck.rules.leaf_modified_in_place import leaf_modified_in_place
from ampcheck.rules.little_headroom import little_headroom
from ampcheck.rules.loss_not_finite import loss_not_finite
from ampcheck.rules.loss_scale_collapse import loss_scale_collapse
from ampcheck.rules.low_precision_overflow import low_precision_overflow
from ampcheck.rules.low_precision_parameters import low_precision_parameters
from ampcheck.rules.missing_grad_scaler import missing_grad_scaler
from ampcheck.rules.mixed_dtypes_in_module import mixed_dtypes_in_module
from ampcheck.rules.module_outside_autocast import module_outside_autocast
from ampcheck.rules.module_outside_policy import module_outside_policy
from ampcheck.rules.needless_grad_scaler import needless_grad_scaler
from ampcheck.rules.no_inf_checks import no_inf_checks
from ampcheck.rules.no_numpy_dtype import no_numpy_dtype
from ampcheck.rules.op_not_implemented import op_not_implemented
from ampcheck.rules.op_unknown_to_autocast import op_unknown_to_autocast
from ampcheck.rules.opaque_call_in_graph import opaque_call_in_graph
from ampcheck.rules.optimizer_eps_lost import optimizer_eps_lost
from ampcheck.rules.optimizer_holds_other_parameters import optimizer_holds_other_parameters
from ampcheck.rules.parameters_updated_before_backward import parameters_updated_before_backward
from ampcheck.rules.precision_unsupported import precision_unsupported
from ampcheck.rules.rule import Rule
from ampcheck.rules.saved_tensor_hooks_without_check import saved_tensor_hooks_without_check
from ampcheck.rules.saved_tensor_modified import saved_tensor_modified
from ampcheck.rules.saved_tensor_modified_silently import saved_tensor_modified_silently
from ampcheck.rules.scaler_bad_argument import scaler_bad_argument
from ampcheck.rules.scaler_out_of_order import scaler_out_of_order
from ampcheck.rules.silent_promotion import silent_promotion
from ampcheck.rules.singular_operation import singular_operation
from ampcheck.rules.state_not_finite import state_not_finite
from ampcheck.rules.steps_skipped import steps_skipped
from ampcheck.rules.train_eval_mismatch import train_eval_mismatch
from ampcheck.rules.unsafe_loss import unsafe_loss
from ampcheck.rules.unscale_low_precision_gradients import unscale_low_precision_gradients
from ampcheck.rules.unscaled_backward import unscaled_backward
from ampcheck.rules.updates_lost import updates_lost
from ampcheck.rules.view_modified_in_place import view_modified_in_place

RULES: tuple[Rule, ...] = (
    autocast_not_active,
    autocast_bad_argument,
    autocast_wrong_device,
    autocast_dtype_differs,
    train_eval_mismatch,
    autocast_around_backward,
    precision_unsupported,
    deprecated_amp_api,
    autocast_cache_under_no_grad,
    module_outside_autocast,
    module_outside_policy,
    low_precision_parameters,
    mixed_dtypes_in_module,
    dtype_mismatch,
    double_precision,
    custom_function_without_cast,
    op_unknown_to_autocast,
    op_not_implemented,
    silent_promotion,
    in_place_dtype,
    unsafe_loss,
    ema_low_precision,
    no_numpy_dtype,
    missing_grad_scaler,
    needless_grad_scaler,
    unscale_low_precision_gradients,
    no_inf_checks,
    clip_before_unscale,
    scaler_out_of_order,
    loss_scale_collapse,
    fused_optimizer_clipping,
    optimizer_holds_other_parameters,
    first_step_skipped,
    unscaled_backward,
    scaler_bad_argument,
    saved_tensor_modified,
    saved_tensor_modified_silently,
    leaf_modified_in_place,
    view_modified_in_place,
    parameters_updated_before_backward,
    inference_tensor_in_autograd,
    buffers_rewritten_between_forwards,
    graph_freed_or_detached,
    saved_tensor_hooks_without_check,
    backward_hook_on_in_place,
    loss_not_finite,
    low_precision_overflow,
    constant_lost,
    singular_operation,
    fully_masked_softmax,
    little_headroom,
    gradients_underflow,
    updates_lost,
    optimizer_eps_lost,
    input_not_finite,
    state_not_finite,
    steps_skipped,
    float32_diverges_too,
    export_differs,
    constant_baked_into_trace,
    opaque_call_in_graph,
    autocast_captured_in_trace,
    export_failed,
    internal_error,
)
