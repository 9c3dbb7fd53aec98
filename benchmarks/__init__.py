"""Benchmarks: one harness (`measure`), one script per question.

python -m benchmarks.step       what a functional training step costs against eager and compiled `nn.Module`
python -m benchmarks.epoch      what the whole `train` command costs against the article's program
"""
