"""`mmmamba-edge eval`: public benchmarks from the files their authors publish (docs/evaluation.md).

task.py is what the benchmarks have in common; each has a file of its own, which reads its format
and holds its metric. NumPy and a runtime are all that is needed.
"""
