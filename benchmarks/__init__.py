"""What a run costs and how fast it is.

    plan   `python -m benchmarks.plan CONFIG --ranks=8`: network rows, memory and time of a run, before it starts
    bench  `python -m benchmarks.bench`: measurements, one table each

The figures are in README.md here. The method does not need this folder.
"""
