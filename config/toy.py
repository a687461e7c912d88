"""The main job on a laptop: the paper's experiment in miniature (three minutes on two free cores)."""
world = "toy"
weights = "toy/weights"
frames = 5
height = 24
width = 40
v = (0.03, 0.22, 0.11, 0.05)       # m/frame: up to 1.7 times the base's fastest training speed
omega = (0.5, 4.5, 2.2, 1.0)       # deg/frame: likewise
conditions = 16
members = 16
steps = 6
shift = 5.0
strategy = "random"                # LongCat's: one step, early, where the camera is decided
size = 1
first = 2
tau = 0.9                          # wider than LongCat's 0.45: the base explores little by itself
tail = 0.4
rewards = "trans=1,rot=1,sharpness=0.01,flicker=0.03"
reward_batch = 32
lr = 2e-4
iterations = 80
save_every = 20
sample_every = 20
checkpointing = False
out = "out/toy"
