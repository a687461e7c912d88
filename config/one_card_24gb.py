"""One 24 GB card: 49 frames of 368x640 in place of 81 of 480x832, and no HPSv3.

The base was trained on the larger ones, so its pictures are worse to begin with, and long paths
are not seen; HPSv3's 15.5 GB do not fit beside the optimiser, so nothing looks at single frames'
beauty: watch the samples.

What `python -m benchmarks.plan config/one_card_24gb.py --card=24 --rate=80` says: 22.5 GB at the
update of 23.2 usable; 85 network rows for a condition, each a sixth of a full one; 4,480 videos;
4 GB a checkpoint; 9 GB of the computer's memory; 0.24 h an iteration, so 1.4 days at 80 TFLOP/s.
"""
world = "clips"
frames = 49
height = 368
width = 640
conditions = 4
strategy = "random"                # the fast recipe: see geo_align_fast.py
size = 2
first = 6
window_per_condition = True
tail = 0.25
micro_batch = 1                    # one row fills a card
compile = True
rewards = "trans=1,rot=1,vq=1,mq=1"
estimator_stride = 3               # cameras of every third frame, interpolated between
park = True                        # reward models visit the card one at a time
save_every = 5
sample_every = 20
out = "out/one_card_24gb"
