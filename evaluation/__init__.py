"""Did it get better, and at what? The parts of evaluate.py.

    cases     which clips, paths, speeds, checkpoints      generate  videos from a policy, by the plain ODE
    scores    every number of a video                       report    tables, page the page of them
    toy       the protocol in the toy world                 retake    a video of your own
    compare   several evaluations together                  outside   ViPE, VBench, MEt3R as programs
    warping   TrajectoryCrafter and CogNVS, there and back  ablation  Table 3 in the toy world

Skip it until a number in a table surprises you.
"""
