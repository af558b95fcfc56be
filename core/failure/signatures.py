"""The failures that AmpCheck knows, by type and message, in the wordings of torch 2.4 and later."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ampcheck.failure.autocast_call import autocast_call
from ampcheck.failure.autograd import inference_tensor, internal_overlap, no_graph, saved_tensor_modified, view
from ampcheck.failure.frames import Scene
from ampcheck.failure.numbers import rejected_by_check
from ampcheck.failure.operation import (
    custom_function_state,
    dtype_mismatch,
    in_place_dtype,
    no_numpy_dtype,
    op_not_implemented,
)
from ampcheck.failure.scaling import low_precision_gradients, missing_gradients, scaler_argument, scaler_order
from ampcheck.trace import (
    BackwardHookView,
    CustomFunctionViewModified,
    Facts,
    FirstStepSkipped,
    FusedOptimizerClipping,
    GraphFreed,
    LeafModified,
    LeafViewModified,
    MultiViewModified,
    NoGradViewModified,
    ScalerWithoutBfloat16,
    UnsafeLoss,
    ValueRejected,
    ViewedBaseModified,
)

Examine = Callable[[Scene], "Facts | None"]


@dataclass(frozen=True)
class Signature:
    """How to recognise a kind of failure, and the function that reads its facts with the named groups of ``pattern``
    (``None``: the frames show another fault). ``through`` is a file of PyTorch that the exception must have passed
    through, for messages that say too little."""

    facts: Examine
    types: tuple[type[BaseException], ...]
    pattern: re.Pattern[str]
    through: str | None = None


def _signature(
    facts: Examine, types: tuple[type[BaseException], ...], pattern: str, through: str | None = None
) -> Signature:
    return Signature(facts, types, re.compile(pattern, re.DOTALL), through)


def _alone(kind: Callable[[], Facts]) -> Examine:
    """A reader for a failure about which only its kind is known."""
    return lambda scene: kind()


_RUNTIME = (RuntimeError,)
_TYPE_OR_RUNTIME = (TypeError, RuntimeError)
_VALUE_OR_RUNTIME = (ValueError, RuntimeError)

# A dtype as PyTorch's messages spell it: Half, float, c10::BFloat16, torch.cuda.FloatTensor, CPUBFloat16Type...
_T = r"(?:struct )?[\w.:]+"

AUTOCAST_ARGUMENT = (
    # Dynamo binds the arguments itself, with other words: "missing a required argument: 'device_type'".
    _signature(
        autocast_call,
        _TYPE_OR_RUNTIME,
        r"(?:missing (?:1 required positional argument|a required argument): '(?P<missing>device_type)'"
        r"|got an unexpected keyword argument '(?P<unexpected>\w+)').*from user code:.*\bautocast\b",
    ),
    _signature(
        autocast_call,
        (TypeError,),
        r"^autocast(?:\.__(?:init|new)__)?\(\) (?:missing 1 required positional argument: '(?P<missing>device_type)'"
        r"|got an unexpected keyword argument '(?P<unexpected>\w+)'|got multiple values|takes )",
    ),
    _signature(
        autocast_call,
        _VALUE_OR_RUNTIME,
        r"Expected `device_type` of type `str`, got: `<class '(?P<object>[\w.]+)'>`",
        through="amp/autocast_mode.py",
    ),
    _signature(
        autocast_call,
        _RUNTIME,
        r"Expected one of .* device type at start of device string: (?P<unknown>\S*)",
        through="amp/autocast_mode.py",
    ),
    _signature(
        autocast_call,
        _RUNTIME,
        r"(?P<unsupported>unsupported scalarType|unsupported autocast device_type|Device string must not be empty)",
        through="amp/autocast_mode.py",
    ),
    _signature(
        autocast_call,
        (TypeError,),
        r"set_autocast_dtype\(\): argument 'dtype' .*must be torch\.dtype, not (?P<dtype>\w+)",
        through="amp/autocast_mode.py",
    ),
)

DTYPES = (
    _signature(
        dtype_mismatch,
        _RUNTIME,
        rf"(?P<role_a>Input) type \((?P<a>{_T})\) and (?P<role_b>weight|bias) type \((?P<b>{_T})\) should be the same",
    ),
    _signature(
        dtype_mismatch,
        _RUNTIME,
        rf"(?P<role_a>mat1|m1|self) and (?P<role_b>mat2|m2) (?:must|to) have the same dtype, but got:? (?P<a>{_T})"
        rf"(?: and | != )(?P<b>{_T})",
    ),
    _signature(
        dtype_mismatch,
        _RUNTIME,
        rf"dot : expected both vectors to have same dtype, but found (?P<a>{_T}) and (?P<b>{_T})",
    ),
    _signature(
        dtype_mismatch,
        _RUNTIME,
        rf"addmv input tensors must have the same dtype, but got (?P<c>{_T}), (?P<a>{_T}), and (?P<b>{_T})",
    ),
    _signature(
        dtype_mismatch,
        _RUNTIME,
        rf"Input dtypes must be the same, got: (?P<role_c>input) (?P<c>{_T}), (?P<role_a>batch1): (?P<a>{_T}), "
        rf"(?P<role_b>batch2): (?P<b>{_T})",
    ),
    _signature(
        dtype_mismatch,
        _RUNTIME,
        rf"All tensors must have the same dtype, got (?P<role_c>input1): (?P<c>{_T}), (?P<role_a>input2): (?P<a>{_T}), "
        rf"(?P<role_b>weight): (?P<b>{_T})",
    ),
    _signature(
        dtype_mismatch,
        _RUNTIME,
        rf"Expected query, key, and value to have the same dtype, but got (?P<role_a>query)\.dtype: (?P<a>{_T}) "
        rf"(?P<role_b>key)\.dtype: (?P<b>{_T}) and (?P<role_c>value)\.dtype: (?P<c>{_T}?) instead",
    ),
    _signature(
        dtype_mismatch,
        (ValueError,),
        rf"RNN input dtype \((?P<a>{_T})\) does not match weight dtype \((?P<b>{_T})\)",
    ),
    _signature(
        dtype_mismatch,
        (ValueError,),
        rf"input must have the type (?P<b>{_T}), got type (?P<a>{_T})",
        through="nn/modules/rnn.py",
    ),
    _signature(dtype_mismatch, _RUNTIME, rf"prelu: Type promoting not supported\. Got (?P<a>{_T}) and (?P<b>{_T})"),
    _signature(
        dtype_mismatch,
        _RUNTIME,
        rf"grid_sampler\(\): expected (?P<role_a>input) and (?P<role_b>grid) to have same dtype, but input has "
        rf"(?P<a>{_T}) and grid has (?P<b>{_T})",
    ),
    _signature(
        dtype_mismatch,
        _RUNTIME,
        rf"Expected tensor for argument #\d+ '(?P<role_a>\w+)' to have the same type as tensor for argument #\d+ "
        rf"'(?P<role_b>\w+)'; but type (?P<a>{_T}) does not equal (?P<b>{_T})",
    ),
    _signature(
        dtype_mismatch,
        _RUNTIME,
        rf"multi_dot\(\): all tensors must have be the same dtype but tensor \d+ is (?P<a>{_T}) and tensor \d+ "
        rf"(?P<b>{_T})",
    ),
    _signature(
        dtype_mismatch,
        _RUNTIME,
        rf"[Ee]xpected (?:object of )?scalar type (?P<a>{_T}) but (?:found|got scalar type) (?P<b>{_T})",
    ),
    _signature(dtype_mismatch, _RUNTIME, rf"Found dtype (?P<b>{_T}) but expected (?P<a>{_T})"),
    _signature(
        dtype_mismatch,
        _RUNTIME,
        rf"attempting to assign a gradient with dtype '(?P<a>{_T})' to a tensor with (?:grad_)?dtype '(?P<b>{_T})'",
    ),
    _signature(
        dtype_mismatch,
        _RUNTIME,
        r"mixed dtype \(CPU\): (?:expect (?:parameter|input) to have scalar type of (?P<b>\w+)|all inputs must share)"
        r"|(?P<promotes>Unexpected floating ScalarType in at::autocast::prioritize)"
        r"|get_mkldnn_dtype: unsupported data type"
        r"|both inputs should have same dtype"
        r"|(?:dets|input) should have the same type as (?:scores|rois)"
        r"|params, grads, exp_avgs, and exp_avg_sqs must have same dtype"
        r"|quantile\(\) q tensor must be same dtype as the input tensor",
    ),
    _signature(
        dtype_mismatch,
        _RUNTIME,
        rf"returned an invalid gradient at index \d+ - expected type (?P<a>{_T}) but got (?P<b>{_T})",
    ),
    _signature(
        in_place_dtype,
        _RUNTIME,
        rf"(?P<op>Index put) requires the source and destination dtypes match, got (?P<a>{_T}) for the destination and "
        rf"(?P<b>{_T}) for the source",
    ),
    _signature(in_place_dtype, _RUNTIME, r"(?P<op>scatter)\(\): Expected self\.dtype to be equal to src\.dtype"),
    _signature(
        in_place_dtype,
        _RUNTIME,
        rf"(?P<op>index_add_)\(\): self \((?P<a>{_T})\) and source \((?P<b>{_T})\) must have the same scalar type",
    ),
    _signature(
        in_place_dtype,
        _RUNTIME,
        rf"(?P<op>index_copy_)\(\): self and source expected to have the same dtype, but got \(self\) (?P<a>{_T}) and "
        rf"\(source\) (?P<b>{_T})",
    ),
    _signature(
        in_place_dtype,
        _RUNTIME,
        rf"(?P<op>put_)\(\): self and source expected to have the same dtype, but got self\.dtype = (?P<a>{_T}) and "
        rf"source\.dtype = (?P<b>{_T})",
    ),
    _signature(
        in_place_dtype,
        _RUNTIME,
        rf"(?P<op>masked_scatter_?): expected self and source to have same dtypes but got ?(?P<a>{_T}) and (?P<b>{_T})",
    ),
    _signature(
        dtype_mismatch,
        _RUNTIME,
        rf"expected dtype (?P<a>{_T}) for `(?P<role_b>end|weight)` but got dtype (?P<b>{_T})",
    ),
    _signature(
        in_place_dtype, _RUNTIME, rf"result type (?P<b>{_T}) can't be cast to the desired output type (?P<a>{_T})"
    ),
    _signature(
        in_place_dtype,
        _RUNTIME,
        rf"Expected (?P<op>out) tensor to have dtype (?P<b>{_T}), but got (?P<a>{_T}) instead",
    ),
    _signature(
        _alone(ScalerWithoutBfloat16),
        _RUNTIME,
        r"_amp_foreach_non_finite_check_and_unscale_\w*\"? not implemented for '(?P<a>BFloat16)'",
    ),
    _signature(
        op_not_implemented, _RUNTIME, r"\"?(?P<op>[\w:]+)\"? not implemented for '?(?P<a>Half|BFloat16|ComplexHalf)'?"
    ),
    _signature(
        op_not_implemented,
        _RUNTIME,
        r"(?P<op>[\w.]+): Low precision dtypes not supported\. Got (?P<a>Half|BFloat16)",
    ),
    _signature(op_not_implemented, _RUNTIME, r"Unsupported dtype (?P<a>Half|BFloat16)"),
    _signature(
        op_not_implemented,
        _RUNTIME,
        r"could not create a primitive descriptor for (?:the|an?) (?P<op>[\w ]+?) (?:forward |backward )?propagation",
    ),
    _signature(op_not_implemented, _RUNTIME, r"FFT doesn't support tensors of type: (?P<a>Half|BFloat16)"),
    _signature(
        op_not_implemented,
        _RUNTIME,
        r"cuFFT only supports dimensions whose sizes are powers of two when computing in (?P<a>half) precision",
    ),
    _signature(
        op_not_implemented,
        _RUNTIME,
        r"Expected both inputs to be Half, Float or Double tensors but got (?P<a>BFloat16)"
        r"|(?P<op>view_as_complex) is only supported for half, float and double tensors, but got a tensor of scalar "
        r"type: (?P<b>BFloat16)",
    ),
    _signature(
        op_not_implemented,
        _RUNTIME,
        r"(?P<op>quantile)\(\) input tensor must be either float or double dtype"
        r"|This function doesn't handle types other than float and double",
    ),
    _signature(no_numpy_dtype, (TypeError,), r"Got unsupported ScalarType (?P<a>BFloat16)"),
    _signature(_alone(UnsafeLoss), _RUNTIME, r"binary_cross_entropy and torch\.nn\.BCELoss are unsafe to autocast"),
    _signature(
        custom_function_state,
        (AttributeError,),
        r"'(?P<node>\w+)Backward' object has no attribute '_(?:fwd_used_autocast|dtype)'",
    ),
)

SCALER = (
    _signature(low_precision_gradients, (ValueError,), r"Attempting to unscale FP16 gradients"),
    _signature(missing_gradients, (AssertionError,), r"No inf checks were recorded for this optimizer"),
    _signature(scaler_order, (AssertionError,), r"No inf checks were recorded (?P<early_update>prior to update)"),
    _signature(
        scaler_order,
        _RUNTIME,
        r"(?P<unscaled_twice>unscale_\(\) has already been called on this optimizer since the last update)",
    ),
    _signature(scaler_order, _RUNTIME, r"(?P<unscaled_late>unscale_\(\) is being called after step\(\))"),
    _signature(scaler_order, _RUNTIME, r"(?P<stepped_twice>step\(\) has already been called since the last update)"),
    _signature(scaler_order, (AssertionError,), r"Attempted (?P<never_scaled>\w+) but _scale is None"),
    _signature(
        _alone(FusedOptimizerClipping),
        (Exception,),
        r"[Gg]radient clipping (?:is not implemented for optimizers handling the unscaling"
        r"|because it performs unscaling)",
    ),
    _signature(
        _alone(FirstStepSkipped),
        (Warning,),
        r"Detected call of `lr_scheduler\.step\(\)` before `optimizer\.step\(\)`",
    ),
    _signature(
        scaler_argument,
        (TypeError,),
        r"full\(\)(?: received an invalid combination of arguments|: argument 'fill_value' .* must be Number, not)",
        through="amp/grad_scaler.py",
    ),
    _signature(
        scaler_argument,
        (TypeError,),
        r"^GradScaler\.__init__\(\) got an unexpected keyword argument '(?P<unexpected>\w+)'",
    ),
    _signature(
        scaler_argument,
        _RUNTIME,
        r"(?P<unexpected>[Cc]losure) use is not currently supported if GradScaler is enabled",
    ),
)

# "output 0 of Relu" since torch 2.13, "output 0 of ReluBackward0" before.
_NODE = r"(?P<node>\w+?)(?:Backward\d*)?"

AUTOGRAD = (
    _signature(
        saved_tensor_modified,
        _RUNTIME,
        r"variables needed for gradient computation has been modified by an inplace operation: "
        rf"\[(?P<a>[\w.]+) \[(?P<shape>[\d, ]*)\]\](?:, which is output (?P<output>\d+) of {_NODE},)? "
        r"is at version (?P<version_found>\d+); expected version (?P<version_expected>\d+) instead",
    ),
    _signature(
        saved_tensor_modified,
        _RUNTIME,
        r"variables needed for gradient computation has been modified by an inplace operation",
    ),
    _signature(
        view(LeafViewModified), _RUNTIME, r"a view of a leaf Variable that requires grad is being used in an in-place"
    ),
    _signature(_alone(LeafModified), _RUNTIME, r"a leaf Variable that requires grad is being used in an in-place"),
    _signature(
        view(BackwardHookView),
        _RUNTIME,
        r"Output (?P<output>\d+) of (?P<node>BackwardHookFunction)(?:Backward)? is a view and is being modified",
    ),
    _signature(
        view(MultiViewModified),
        _RUNTIME,
        rf"Output (?P<output>\d+) of {_NODE} is a view and is being modified inplace\. This view is the output of a "
        "function that returns multiple views",
    ),
    _signature(
        view(CustomFunctionViewModified),
        _RUNTIME,
        rf"Output (?P<output>\d+) of {_NODE} is a view and is being modified inplace\. This view was created inside a "
        "custom Function",
    ),
    _signature(
        view(NoGradViewModified),
        _RUNTIME,
        r"A view was created in (?P<mode>no_grad|inference) mode and is being modified inplace",
    ),
    _signature(
        view(ViewedBaseModified),
        _RUNTIME,
        rf"(?:Output (?P<output>\d+) of {_NODE} is a view|A view was created in (?P<mode>no_grad|inference) mode) "
        "and its base or another view of its base has been modified inplace",
    ),
    _signature(
        inference_tensor,
        _RUNTIME,
        r"(?P<saved>Inferences? tensors? cannot be saved for backward)"
        r"|(?P<written>Inplace update to inference tensor outside InferenceMode)"
        r"|(?P<leaf>Setting requires_grad=True on inference tensor outside InferenceMode)",
    ),
    _signature(_alone(GraphFreed), _RUNTIME, r"Trying to backward through the graph a second time"),
    _signature(
        no_graph, _RUNTIME, r"element (?P<element>\d+) of tensors does not require grad and does not have a grad_fn"
    ),
    _signature(
        internal_overlap,
        _RUNTIME,
        r"(?P<input>some elements of the input tensor and the written-to tensor)"
        r"(?: refers?| refer) to a single memory location"
        r"|(?P<self>more than one element of the written-to tensor) refers? to a single memory location",
    ),
)

NUMBERS = (
    _signature(
        _alone(ValueRejected),
        (Exception,),
        r"(?i)\b(?:nans?|infs?|infinity|infinite|non[- ]?finite|not finite)\b|invalid numeric entries"
        r"|cost matrix is infeasible|to satisfy the constraint .*but found invalid values",
    ),
    _signature(rejected_by_check, (AssertionError, ArithmeticError), r""),
)

SIGNATURES: tuple[Signature, ...] = AUTOCAST_ARGUMENT + SCALER + AUTOGRAD + DTYPES + NUMBERS
