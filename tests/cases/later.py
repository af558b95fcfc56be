"""Plain scripts that fail between their second and their fiftieth step, which nobody watches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cases import Cases, Script

CASES = Cases(family="later")


def script(name: str, code: str = "AMP401", module: str | None = None, **expected: Any) -> None:
    path = Path(__file__).parents[1] / "later" / f"{name}.py"
    marks = {"write": "write", "save": "save"}
    expected = {"marks": marks, "trains": False, "module": module, **expected}
    CASES.append(Script(name.replace("_", "-"), path.exists, code, "later", path=path, **expected))


script("gan_feature_matching")
script("gan_score_reused", "AMP405")
script("ema_teacher_consistency")
script("rnn_state_carried", "AMP405", module="")
script("tbptt_reset", module="")
script("curriculum_switch", module="1")
script("accumulation_remainder")
script("warmup_callback")
script("manifold_mixup", module="")
script("maml_inner_loop", module="2")
script("trainer_with_hooks", module="out")
script("lbfgs_closure")
script("progressive_dropout", module="2")
script("generator_loader", module="net.3")
script("while_until_converged")
script("try_out_of_memory")
script("checkpointed_block", module="blocks.1")
script("world_model_unroll")
script("dqn_target_network")
script("loss_weighting")
script("custom_function_output", module="")
script("autocast_with_scaler")
script("try_finally")
script("momentum_queue", "AMP407", module="")
script("weight_averaging", module="2")
script("weight_clipping")
script("feature_pyramid", module="")
script("ragged_attention", module="")
script("bad_samples")
script("dataclass_outputs", module="")
script("ppo_epochs")
script("diffusion_threshold")
script("pruning_hook", module="act")
script("actor_after_critic", "AMP405", module="2")
script("sequence_of_stages", module="")
# Written after what the first ones showed was mended.
script("seq2seq_scheduled_sampling", module="")
script("lstm_state_on_self", "AMP405", module="lstm")
script("hypernetwork_rescale", module="")
script("ensemble_in_a_list")
script("sam_second_step", module="2")
script("stochastic_depth_residual", module="2")
script("prototype_memory")
script("grad_penalty_interpolated")
script("masked_autoencoder", module="")
script("distillation_temperature", module="")
script("rollout_hidden_list", module="")
script("embedding_renorm")
script("multi_optimizer_shared_trunk", "AMP405")
script("progress_bar_loop")
script("quantized_straight_through", "AMP407", module="vq")
