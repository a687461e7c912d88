"""Eight 80 GB cards in two days: the fast recipe, 16 conditions where the paper had 64.

What `python -m benchmarks.plan config/eight_cards_80gb.py --ranks=8 --card=80` says: 69.3 GB at
the update of 77.3 usable; 85 network rows for a condition; 17,920 videos; 4 GB a checkpoint; 0.37
h an iteration, so 2.1 days at 150 TFLOP/s (48 % of an A100), 0.8 at --rate=400.
"""
world = "clips"
conditions = 16                    # two on each card; 40 take as long on cards of 400 TFLOP/s
strategy = "random"                # the fast recipe: see geo_align_fast.py
size = 2
first = 6
window_per_condition = True
tail = 0.25
micro_batch = 1                    # one row fills a card
compile = True
estimator_stride = 3               # cameras of every third frame, interpolated between
save_every = 5
out = "out/eight_cards"
