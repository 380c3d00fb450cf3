"""The log reads a step's values later, as they were."""

import torch

from hanorec.run.log import LaterValues


def test_values_are_read_later_as_they_were():
    loss, norm = torch.tensor(0.1), torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    values = LaterValues({"lr": 1e-5, "loss": loss, "warmup": False, "grad_norm": norm})
    loss.fill_(7.0)
    assert values.read() == {"lr": 1e-5, "loss": float(torch.tensor(0.1)), "warmup": False, "grad_norm": 2.5}
    assert LaterValues({"lr": 1e-5}).read() == {"lr": 1e-5}


def test_values_on_a_gpu_are_read_after_their_copy(monkeypatch):
    """Only the copy is waited for, and only when the values are read."""
    calls = []

    class Event:
        def record(self):
            calls.append("record")

        def synchronize(self):
            calls.append("synchronize")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    values = LaterValues({"loss": torch.tensor(0.5)})
    assert calls == ["record"]
    assert values.read() == {"loss": 0.5} and calls == ["record", "synchronize"]
