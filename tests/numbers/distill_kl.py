import math
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F


class Student(nn.Module):
    def __init__(self, d=14, classes=6):
        super().__init__()
        self.fc1 = nn.Linear(d, 20)
        self.fc2 = nn.Linear(20, classes)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))


def teacher_probs(step, n=9, classes=6):
    g = torch.Generator().manual_seed(step)
    logits = torch.randn(n, classes, generator=g)
    probs = logits.softmax(-1)
    if step == 7:
        probs[4] = F.one_hot(torch.tensor(1), classes)  # a hand-labelled sample has hard probabilities
    return torch.randn(n, 14, generator=g), probs


def kl(teacher, student_logits):
    log_student = F.log_softmax(student_logits, -1)
    return (teacher * (torch.log(teacher) - log_student)).sum(-1).mean()  # <- origin
    # -
    # + return (teacher * (torch.log(teacher.clamp(min=1e-8)) - log_student)).sum(-1).mean()


def train_one_epoch(student, optimizer, steps):
    for step in range(steps):
        x, teacher = teacher_probs(step)
        loss = kl(teacher, student(x))
        loss_value = loss.item()
        if not math.isfinite(loss_value):
            print(f"Loss is {loss_value}, stopping training")
            sys.exit(1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step} kl {loss_value:.4f}")


torch.manual_seed(16)
student = Student()
train_one_epoch(student, torch.optim.SGD(student.parameters(), lr=0.1), 12)
