"""What a run costs and how fast it is.

    gradients how small gradients are, so what eps must be
    plan      `python -m benchmarks.plan CONFIG --ranks=8 --card=80`: rows, memory and days of a run, before it starts
    bench     `python -m benchmarks.bench COMMAND`: measurements, one table each; `card` is all that a card owes us
    official  ReDirector's own network, timed by bench inside its checkout

The figures are in README.md here. The method does not need this folder.
"""
