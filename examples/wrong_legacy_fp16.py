"""Wrong on purpose: `fp16 = dict(...)` in an MMEngine config.

In MMCV 1.x and MMDetection 2 this line turned mixed precision on. MMEngine ignores it: the config loads and the run
trains in float32. Only AmpCheck reports it (AMP101).

    pip install '.[mmengine]' scikit-learn
    python examples/wrong_legacy_fp16.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import digits_mmengine  # noqa: F401  registers the model, the data set and the metric
from mmengine.config import Config
from mmengine.runner import Runner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", default="work_dirs/wrong_legacy_fp16")
    args = parser.parse_args()

    config = Config.fromfile(Path(__file__).with_name("digits_mmengine_config.py"))
    config.work_dir = args.work_dir
    config.fp16 = {"loss_scale": 512.0}
    Runner.from_cfg(config).train()


if __name__ == "__main__":
    main()
