"""How the files beside this one were made, with PyTorch 2.6: ``python make.py FOLDER``."""

import sys
from pathlib import Path

import torch


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = torch.nn.Linear(2, 1)

    def forward(self, x: torch.Tensor, bias: torch.Tensor):  # type: ignore[no-untyped-def]
        return self.l(x) + bias, x


class Keyed(Net):
    def forward(self, x: torch.Tensor):  # type: ignore[no-untyped-def,override]
        h = self.l(x)
        return {"logits": h, "best": h.argmax(1)}


def main(folder: Path) -> None:
    net, keyed = Net().eval(), Keyed().eval()
    for module in (net, keyed):
        with torch.no_grad():
            module.l.weight.copy_(torch.tensor([[1.0, 2.0]]))
            module.l.bias.copy_(torch.tensor([0.5]))
    torch.jit.save(torch.jit.script(net), folder / "script.pt")
    rows = {0: torch.export.Dim("b")}
    torch.export.save(torch.export.export(keyed, (torch.zeros(2, 2),), dynamic_shapes=(rows,)), folder / "program.pt2")
    torch.save(net.state_dict(), folder / "weights.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
