"""Benchmarks: one harness (`measure`), one script per question, and the README's tables.

| command | question |
|---|---|
| `python -m benchmarks.step` | What does a functional step cost against eager and compiled `nn.Module`? |
| `python -m benchmarks.epoch` | What does the whole `train` command cost against the article's program? |
| `python -m benchmarks.normals` | What do keyed normal numbers cost against `torch.randn`? |
| `python -m benchmarks.per_sample` | What do clipped steps and norms cost against an ordinary step and others'? |
| `python -m benchmarks.strategies` | Which way of taking inner products is faster, Gram matrices or built gradients? |
| `python -m benchmarks.readme` | (writes the README's tables from committed results) |
"""
