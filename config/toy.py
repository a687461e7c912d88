"""The main job on a laptop: the paper's experiment in miniature."""
world = "toy"
weights = "toy/weights"
frames = 9
height = 48
width = 80
v = (0.03, 0.22, 0.11, 0.05)       # m/frame: up to 1.7 times the base's fastest training speed
omega = (0.5, 4.5, 2.2, 1.0)       # deg/frame: likewise
conditions = 16
members = 16
steps = 6
shift = 5.0
strategy = "random"
size = 2
first = 3                          # always steps 1 and 2: early, where the camera is decided, ...
skip = 1                           # ... but not at t = 1, where a step is too small to decide anything
tau = 0.6                          # wider than LongCat's 0.45: the base explores little by itself
rewards = "trans=1,rot=0.5,sharpness=0.01,flicker=0.03"
micro_batch = 64                   # rows and videos that fit a processor's cache: a tenth faster
reward_batch = 64
normalise = "group"                # GRPO's; Eq. 5's common divisor learns less here
lr = 2e-4
iterations = 80
save_every = 20
sample_every = 20
checkpointing = False
out = "out/toy"
