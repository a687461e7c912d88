"""One 80 GB card in four days: the fast recipe with 4 conditions an iteration, so gradients are noisier.

@PLAN@
"""
world = "clips"
conditions = 4
strategy = "random"                # the fast recipe: see geo_align_fast.py
size = 1
first = 6
window_per_condition = True
tail = 0.4
micro_batch = 1                    # one row fills a card
compile = True
estimator_stride = 3               # cameras of every third frame, interpolated between
save_every = 5
sample_every = 20
out = "out/one_card"
