"""Settings of classification: what contradicts what, and what follows from what."""

import pytest
from classifier_flags import parse

from vicmae_hf.settings import ArgumentsError


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layer_decay", "0"], "layer_decay must be above 0"),
        (["--eval_epochs", "0"], "eval_epochs must be at least 1"),
        (["--config_overrides", "drop_path_rate=0.1"], "set by --drop_path_rate"),
        (["--no-train_augmentation"], "give --method linear"),
        (["--train_data", "a", "b"], "expected one labelled source, got 2"),
    ],
)
def test_settings_that_contradict_each_other(folders, flags, message):
    with pytest.raises(ArgumentsError, match=message):
        parse(folders, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--drop_path_rate", "0.1"], "leaves the encoder as it is"),
        (["--no-train_augmentation", "--mixup", "0.8"], "--no-train_augmentation contradicts --mixup 0.8"),
    ],
)
def test_settings_that_contradict_the_linear_method(folders, flags, message):
    with pytest.raises(ArgumentsError, match=message):
        parse(folders, *flags, method="linear")


def test_a_label_fraction_turns_randaugment_and_mixup_off_unless_they_are_set(folders):
    chosen = ["rand_augment_magnitude", "mixup", "label_smoothing"]
    for flags, expected in [
        ([], [9, 0.8, 0.1]),
        (["--label_fraction", "1.0"], [0, 0, 0.1]),
        (["--label_fraction", "0.1", "--mixup", "0.4"], [0, 0.4, 0.1]),
    ]:
        arguments = parse(folders, *flags)
        assert [getattr(arguments, name) for name in chosen] == expected
