"""What the whole `train` command costs: start to end, against the article's program, on the same data.

    python -m benchmarks.epoch [--rounds 4]

The baseline is the article's program with its one fault mended (it made a new `Net()` for every batch): `nn.Module`,
torchvision's transforms, `DataLoader`, `torch.optim.SGD`. Every arm is a process of its own, from start-up to the
printed accuracy; the arms take turns in shuffled order, and each round has another seed. Nothing here imports torch, so
that the baseline's start-up is its own.
"""

import argparse
import gzip
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from . import measure

LEAST_ACCURACY = 98.0
"""What an arm must reach on the test images, in percent, to have done the same work as the article's program."""


def article(root: str, seed: int) -> None:
    """The article's program: one epoch, then the accuracy on the test images."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
            self.dropout1, self.dropout2 = nn.Dropout2d(0.25), nn.Dropout(0.5)
            self.fc1, self.fc2 = nn.Linear(9216, 128), nn.Linear(128, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(self.conv2(F.relu(self.conv1(x))), 2)
            x = torch.flatten(self.dropout1(x), 1)
            return F.log_softmax(self.fc2(self.dropout2(F.relu(self.fc1(x)))), dim=1)

    torch.manual_seed(seed)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    train_loader = DataLoader(datasets.MNIST(root, train=True, transform=transform), batch_size=64, shuffle=True)
    test_loader = DataLoader(datasets.MNIST(root, train=False, transform=transform), batch_size=1000)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    running_loss = 0.0
    for images, labels in train_loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
    print(f"mean loss {running_loss / len(train_loader):.4f}")
    net.eval()
    correct = total = 0
    with torch.no_grad():
        for images, labels in test_loader:
            correct += int((net(images).argmax(1) == labels).sum())
            total += len(labels)
    print(f"Accuracy of the network on the {total} test images: {100 * correct / total:.2f}%")


class Program:
    """A command that ends with an accuracy; each call has the next seed."""

    def __init__(self, *command: str) -> None:
        self.command, self.accuracies = command, list[float]()

    def call(self) -> None:
        seed = str(len(self.accuracies))
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, *(part.format(seed=seed, folder=folder) for part in self.command)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = re.search(r"test images: ([0-9.]+)%", done.stdout)
        if done.returncode != 0 or found is None:
            raise RuntimeError(f"{command} must end with an accuracy. Found status {done.returncode}.\n{done.stderr}")
        self.accuracies.append(float(found[1]))

    def arm(self, name: str) -> measure.Arm:
        """An arm whose difference is how much accuracy it lacks."""
        return measure.Arm(name, self.call, lambda: self.accuracies[-1])


def lacking(accuracy: float, _expected: float) -> float:
    """By how many percent points an accuracy misses the least one."""
    return max(0.0, LEAST_ACCURACY - accuracy)


def train(*options: str) -> Program:
    """This library's command, with a seed and an out folder of its own."""
    return Program("-m", "functorch_mnist", "train", "--seed", "{seed}", "--out", "{folder}/run", *options)


def unpack_mnist(root: Path) -> None:
    """Lays the shipped files out as torchvision wants them."""
    from functorch_mnist.data import sets

    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in (Path(sets.__file__).parent / "mnist").glob("*.gz"):
        with gzip.open(packed) as source, (raw / packed.stem).open("wb") as target:
            shutil.copyfileobj(source, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="timed runs of each arm; the first run is apart")
    parser.add_argument("--article", nargs=2, metavar=("ROOT", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.article:
        article(options.article[0], int(options.article[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        unpack_mnist(Path(folder))
        programs = {
            "article's program, float32": Program("-m", "benchmarks.epoch", "--article", folder, "{seed}"),
            "train, float32": train(),
            "train, bfloat16": train("--precision", "bfloat16"),
            "train, float32, compiled": train("--compile", "on"),
            "train, bfloat16, compiled": train("--precision", "bfloat16", "--compile", "on"),
            "train, fast recipe": train("--recipe", "fast"),
        }
        result = measure.compare(
            "epoch",
            [program.arm(name) for name, program in programs.items()],
            rounds=options.rounds,
            difference=lacking,
            settings={"accuracies": {name: program.accuracies for name, program in programs.items()}},
            warmups=0,
        )
    for name, program in programs.items():
        mean = statistics.mean(program.accuracies)
        print(
            f"{name}: accuracy {mean:.2f} % on average, {min(program.accuracies):.2f} at least, "
            f"over {len(program.accuracies)} seeds"
        )
    print(f"\n{measure.table(result)}\n\nWritten to {measure.write(result)}")


if __name__ == "__main__":
    main()
