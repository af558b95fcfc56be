"""Lines that write in place, and how they read without the write."""

from __future__ import annotations

import pytest

from ampcheck.rules._edits import copied_argument, out_of_place

WHOLE = {
    # Augmented assignments.
    "out += x": "out = out + x",
    "x *= a + b": "x = x * (a + b)",
    "x -= a * b  # why": "x = x - a * b  # why",
    "x -= a - b": "x = x - (a - b)",
    "x **= 2": "x = x ** 2",
    "h.data += 1": "h = h + 1",
    "self.h += y": "self.h = self.h + y",
    "levels[i] += x": "levels[i] = levels[i] + x",
    # Methods.
    "x.mul_(y)": "x = x.mul(y)",
    "x = x.relu_()": "x = x.relu()",
    "y = x.relu_()": "y = x = x.relu()",
    "h.data.mul_(mask)": "h = h.mul(mask)",
    "return std.mul_(eps).add_(mu)": "return std.mul(eps).add(mu)",
    "loss = crit(out.mul_(2), y)": "loss = crit((out := out.mul(2)), y)",
    "é.mul_(ü)": "é = é.mul(ü)",
    "x.copy_(y)": "x = x.clone()\nx.copy_(y)",
    "x.data.zero_()": "x = x.clone()\nx.zero_()",
    "y = x.view(-1).mul_(2)": "x = x.clone()\ny = x.view(-1).mul_(2)",
    "h.T.mul_(2)": "h = h.clone()\nh.T.mul_(2)",
    "h[:] *= 2": "h = h.clone()\nh[:] *= 2",
    "h[..., 0].mul_(2)": "h = h.clone()\nh[..., 0].mul_(2)",
    "h.data = h.data.mul_(2)": "h = h.mul(2)",
    "x.fill_diagonal_(0)": "x = x.clone()\nx.fill_diagonal_(0)",
    # What has no name yet.
    "h = torch.sigmoid(self.fc(x)).mul_(2)": "h = torch.sigmoid(self.fc(x)).mul(2)",
    "return self.out(self.fc(x).exp().add_(1))": "return self.out(self.fc(x).exp().add(1))",
    "(x + 1).mul_(2)": "(x + 1).mul(2)",
    "hs = [h.mul_(2) for h in hs]": "hs = [h.mul(2) for h in hs]",
    # Functions.
    "F.relu(input=h, inplace=True)": "h = F.relu(input=h)",
    "nn.init.trunc_normal_(w)": "w = w.clone()\nnn.init.trunc_normal_(w)",
    "torch.relu_(x)": "x = torch.relu(x)",
    "torch._foreach_add_(xs, ys)": "xs = torch._foreach_add(xs, ys)",
    "F.relu(x, inplace=True)": "x = F.relu(x)",
    "x = F.dropout(x, inplace=True, p=0.1)": "x = F.dropout(x, p=0.1)",
    "y = F.relu(x, inplace=True)": "y = x = F.relu(x)",
    "return F.relu(x, inplace=True)": "return F.relu(x)",
    "torch.add(x, y, out=z)": "z = torch.add(x, y)",
    "w = torch.add(x, out=z, other=y)": "w = z = torch.add(x, other=y)",
}
PART = {
    "x[:, 0] += y": "x = x.clone()\nx[:, 0] += y",
    "x[mask] = 0": "x = x.clone()\nx[mask] = 0",
    "x[0].mul_(2)": "x = x.clone()\nx[0].mul_(2)",
    "x.data[0] = 0": "x = x.clone()\nx[0] = 0",
    "F.relu(h[0], inplace=True)": "h = h.clone()\nF.relu(h[0], inplace=True)",
    "torch.mul(x, y, out=h[0])": "h = h.clone()\ntorch.mul(x, y, out=h[0])",
}
UNTOLD = [
    "out = self.residual(x)",
    "x = self.act(x)",
    "Fn.relu_(x)",
    "hs[1][:, 0] = 0",
    "torch.sigmoid(z).zero_()",
    "x.requires_grad_()",
    "for x in xs: x.mul_(2)",
    "x = F.relu(x, inplace=flag)",
    "x.mul_(",
    "",
]


@pytest.mark.parametrize("before", WHOLE)
def test_whole(before: str) -> None:
    assert out_of_place(before, "", whole=True) == WHOLE[before]


@pytest.mark.parametrize("before", PART)
def test_part(before: str) -> None:
    assert out_of_place(before, "", whole=False) == PART[before]


@pytest.mark.parametrize("before", UNTOLD)
def test_untold(before: str) -> None:
    assert out_of_place(before, "", whole=True) is None


def test_the_op_chooses_among_several() -> None:
    code = "y = F.relu(a.mul_(2), inplace=True) + b.add_(1)"
    assert out_of_place(code, "add_", whole=True) == "y = F.relu(a.mul_(2), inplace=True) + (b := b.add(1))"


def test_copied_argument() -> None:
    assert copied_argument("x = self.act(x)", "act") == "x = self.act(x.clone())"
    assert copied_argument("return self.body(self.h) + y", "body") == "return self.body(self.h.clone()) + y"
    assert copied_argument("x = self.body(x)", "2") is None
    assert copied_argument("x = self.act(x, y)", "act") is None
