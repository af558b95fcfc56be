# ruff: noqa: C408 - configs are written so
custom_imports = dict(imports=["hosts.mmengine_digits", "ampcheck.integrations.mmengine"], allow_failed_imports=False)
custom_hooks = [dict(type="AmpCheckHook")]

model = dict(type="DigitsNet")
optim_wrapper = dict(
    type="AnyDeviceAmpOptimWrapper",
    dtype="float16",
    loss_scale=dict(init_scale=256.0),
    optimizer=dict(type="SGD", lr=0.1, momentum=0.9),
)

train_dataloader = dict(
    batch_size=16,
    dataset=dict(type="Digits", split="train", count=320),
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
)
val_dataloader = dict(
    batch_size=32,
    dataset=dict(type="Digits", split="val", count=64),
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
)
test_dataloader = val_dataloader
train_cfg = dict(by_epoch=True, max_epochs=1)
val_cfg = dict()
test_cfg = dict()
val_evaluator = dict(type="DigitAccuracy")
test_evaluator = val_evaluator

default_hooks = dict(checkpoint=None)
randomness = dict(seed=0)
