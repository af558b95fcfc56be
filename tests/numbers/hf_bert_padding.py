"""A small BERT from transformers (random weights) with eager attention and an own additive mask."""

import torch
from transformers import BertConfig, BertModel


class BertForPairs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        config = BertConfig(
            vocab_size=100,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="eager",
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = torch.nn.Linear(32, 2)

    def pool(self, hidden, mask):
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # <- origin
        # -
        # + return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)

    def forward(self, input_ids, attention_mask):
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.classifier(self.pool(hidden, attention_mask.to(hidden.dtype)))


def encode(batch_idx, size=6, length=10):
    gen = torch.Generator().manual_seed(batch_idx)
    ids = torch.randint(5, 100, (size, length), generator=gen)
    n_tokens = torch.randint(2, length, (size,), generator=gen)
    if batch_idx == 3:
        n_tokens[1] = 0  # an empty string
    mask = (torch.arange(length)[None] < n_tokens[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}, torch.randint(0, 2, (size,), generator=gen)


def finetune(num_batches=6):
    torch.manual_seed(37)
    model = BertForPairs()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    for batch_idx in range(num_batches):
        inputs, labels = encode(batch_idx)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(**inputs)
            loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print({"batch": batch_idx, "loss": round(loss.item(), 4)})


finetune()
