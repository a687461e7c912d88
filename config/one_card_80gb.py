"""One 80 GB card in four days: the fast recipe with 4 conditions an iteration, so gradients are
noisier.

What `python -m benchmarks.plan config/one_card_80gb.py --card=80` says: 71.2 GB at the update of
77.3 usable; 85 network rows for a condition; 4,480 videos; 4 GB a checkpoint; 0.74 h an
iteration, so 4.3 days at 150 TFLOP/s (48 % of an A100), 1.6 at --rate=400.
"""
world = "clips"
conditions = 4
strategy = "random"                # the fast recipe: see geo_align_fast.py
size = 2
first = 6
window_per_condition = True
tail = 0.25
micro_batch = 1                    # one row fills a card
compile = True
estimator_stride = 3               # cameras of every third frame, interpolated between
save_every = 5
sample_every = 20
out = "out/one_card"
