"""The laptop's world, in which the paper's problem is real: see README.md here.

    rooms     rooms, rendering, random paths, the codec      poses     the reward's estimator, the judge
    world     what training and evaluation draw from          pretrain  makes weights/: the base and the estimator

second/ is the next edition, in progress. The method's files run unchanged on it. Read rooms.py and world.py to make a world of your own.
"""
