"""ccd-train probe: classifies characters with frozen features."""

from __future__ import annotations

from ccd_train.config.options import parse
from ccd_train.config.verbs import ProbeOptions


def main(argv: list[str]) -> int:
    options = parse(ProbeOptions, argv, "ccd-train probe")  # before torch is imported: --help is quick
    options.check()
    import cv2
    import torch

    from ccd_train import distributed
    from ccd_train.models.ccd import Student, Teacher
    from ccd_train.tasks.pretrain.probe import NEIGHBOURS, probe, read_words
    from ccd_train.tasks.pretrain.weights import open_weights
    from ccd_train.weights.tensors import load

    assert options.weights is not None
    cv2.setNumThreads(1)
    found = open_weights(options.weights, options.heads)
    words = read_words(options.data, options.words)
    torch.manual_seed(0)
    network = Student(found.model) if options.network == "student" else Teacher(found.model)
    network.to(distributed.device())
    untrained = probe(network.vit, words)
    load(network, getattr(found, options.network), found.origin)
    score = probe(network.vit, words)
    print(f"{score.characters} letters of {score.classes} classes from {len(words.labels)} usable words", end=" ")
    print(f"({score.usable:.1%} of {words.read}); chance {score.chance:.1%}")
    for name, result in ((f"{options.network} of {found.origin}", score), ("the same network, untrained", untrained)):
        print(f"linear {result.linear:6.1%}   {NEIGHBOURS}-NN {result.knn:6.1%}   {name}")
    return 0
