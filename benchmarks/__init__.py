"""What a run costs and how fast it is.

    plan       `python -m benchmarks.plan CONFIG --ranks=8 --card=80`: rows, memory, days; whether it fits
    bench      `python -m benchmarks.bench COMMAND`: a table each; official times ReDirector's own code
    gradients  how small gradients are, so what eps must be
    learning   whether it learns: recipes, KL and updates in the toy
    figures    the README's pictures and tables, from runs and evaluations
    steps      which of the sampler's steps carry signal, for any config

README.md here has the numbers. The method does not need this folder.
"""
