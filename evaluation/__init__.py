"""Did it get better, and at what? The parts of evaluate.py.

    cases     which clips, paths, speeds, checkpoints    generate  videos from a policy, by the ODE
    scores    every number of a video                    report    tables; page: the HTML of them
    toy       the protocol in the toy world              retake    a video of your own
    compare   several evaluations, several runs          trial     what a new reward is worth
    outside   ViPE, VBench, MEt3R as programs            ablation  Table 3 in the toy
    warping   TrajectoryCrafter and CogNVS, there and back    sources   clips as the model sees them

Skip it until a number in a table surprises you.
"""
