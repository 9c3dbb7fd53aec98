"""The article's program, with its one fault mended: it made a new `Net()` for every batch.

    python -m benchmarks.article ROOT SEED EPOCHS LEAST DEVICE THREADS

ROOT is a folder with MNIST as torchvision lays it out. It ends after EPOCHS epochs, or after the first whose accuracy
is at least LEAST percent. Nothing of this repository is imported, so start-up is its own.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms


class Net(nn.Module):
    """The article's network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
        self.dropout1, self.dropout2 = nn.Dropout2d(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(9216, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv2(F.relu(self.conv1(x))), 2)
        x = torch.flatten(self.dropout1(x), 1)
        return F.log_softmax(self.fc2(self.dropout2(F.relu(self.fc1(x)))), dim=1)


def main(root: str, seed: int, epochs: int, least: float, device: str, threads: int) -> None:
    """Trains, then prints the accuracy on the test images."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    train_loader = DataLoader(datasets.MNIST(root, train=True, transform=transform), batch_size=64, shuffle=True)
    test_loader = DataLoader(datasets.MNIST(root, train=False, transform=transform), batch_size=1000)
    net = Net().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    accuracy = 0.0
    for epoch in range(epochs):
        net.train()
        running_loss = 0.0
        for images, labels in train_loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
        net.eval()
        correct = total = 0
        with torch.no_grad():
            for images, labels in test_loader:
                correct += int((net(images.to(device)).argmax(1) == labels.to(device)).sum())
                total += len(labels)
        accuracy = 100 * correct / total
        print(f"epoch {epoch + 1}: mean loss {running_loss / len(train_loader):.4f}, accuracy {accuracy:.2f}%")
        if accuracy >= least:
            break
    print(f"Accuracy of the network on the test images: {accuracy:.2f}%")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[5], int(sys.argv[6]))
