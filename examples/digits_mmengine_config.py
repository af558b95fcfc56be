# ruff: noqa: C408 - MMEngine configs use `dict(...)`

# These two lines add AmpCheck. If a `_base_` config has hooks: `custom_hooks = _base_.custom_hooks + [...]`.
custom_imports = dict(imports=["ampcheck.integrations.mmengine"], allow_failed_imports=False)
custom_hooks = [dict(type="AmpCheckHook")]

model = dict(type="DigitsNet")
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.05, momentum=0.9))

train_dataloader = dict(
    batch_size=64,
    dataset=dict(type="Digits", split="train"),
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
)
val_dataloader = dict(
    batch_size=64,
    dataset=dict(type="Digits", split="val"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
)
train_cfg = dict(by_epoch=True, max_epochs=3)
val_cfg = dict()
val_evaluator = dict(type="DigitAccuracy")

default_hooks = dict(checkpoint=None)
