"""Dataclasses of tensors that slice, join and move as one: the policy's conditions are such."""
import dataclasses

import torch


def tree_map(f, *trees):
    """f on corresponding tensors of nested tuples. None and numbers are passed through."""
    if isinstance(trees[0], tuple):
        return tuple(tree_map(f, *branches) for branches in zip(*trees, strict=True))
    if any((tree is None) != (trees[0] is None) for tree in trees):
        raise ValueError("conditions to be joined must all have the same parts")
    return f(*trees) if torch.is_tensor(trees[0]) else trees[0]


class Batch:
    """A dataclass of tensors, batch first, that slices (x[i:j]), concatenates and moves as one."""
    def map(self, f, *others):
        names = [field.name for field in dataclasses.fields(self)]
        trees = [tuple(getattr(x, name) for name in names) for x in (self, *others)]
        return type(self)(*tree_map(f, *trees))

    @classmethod
    def cat(cls, batches):
        return batches[0].map(lambda *tensors: torch.cat(tensors), *batches[1:])

    def __getitem__(self, rows):
        return self.map(lambda x: x[rows])

    def to(self, *args, **kwargs):
        return self.map(lambda x: x.to(*args, **kwargs))

    def __len__(self):
        text = self.text
        while isinstance(text, tuple):
            text = text[0]
        return len(text)
