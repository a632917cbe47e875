"""Each layout is prepared from a small tree of encoded files, some of them missing, broken or extra."""

import os
from pathlib import Path

import av
import datasets
import pytest
from dataset_trees import hash_of, picture, problems, rows, write
from local_hub import unreachable_hub
from video_files import read_numbers

from vicmae_hf.data.media.reading import MediaLoader
from vicmae_hf.data.preparing.listing import read_official_class_names
from vicmae_hf.data.preparing.preparation import prepare_dataset
from vicmae_hf.data.sources.labelled import open_labelled
from vicmae_hf.errors import InputError


# Class lists.


# Indices from other sources: PyTorchVideo's kinetics_classnames.json, the official labels.json of Something-Something
# v2, the outputs of ImageNet models (tench, tabby, African elephant, toilet tissue).
@pytest.mark.parametrize(
    ("name", "size", "known"),
    [
        (
            "kinetics400",
            400,
            {0: "abseiling", 19: "bench pressing", 88: "deadlifting", 290: "sharpening knives", 399: "zumba"},
        ),
        (
            "ssv2",
            174,
            {
                0: "Approaching something with your camera",
                16: "Holding something",
                20: "Holding something over something",
            },
        ),
        ("imagenet", 1000, {0: "n01440764", 281: "n02123045", 386: "n02504458", 999: "n15075141"}),
    ],
)
def test_shipped_class_lists(name, size, known):
    class_names = read_official_class_names(name)
    assert len(class_names) == len(set(class_names)) == size
    assert {index: class_names[index] for index in known} == known
    assert class_names == sorted(class_names)


# Kinetics.


@pytest.mark.parametrize(("dataset", "number"), [("kinetics600", 600), ("kinetics700", 700)])
def test_kinetics_classes_are_the_sorted_names_of_the_training_list(tmp_path, clips, dataset, number):
    names = [f"class {index * 11 % number:03d}" for index in range(number)]
    train = "label,youtube_id,time_start,time_end,split\n"
    train += "".join(f"{name},{index:011d},0,10,train\n" for index, name in enumerate(names))
    write(tmp_path / "annotations" / "train.csv", train)
    write(
        tmp_path / "annotations" / "val.csv",
        "label,youtube_id,time_start,time_end,split\nclass 500,a,1,2,validate\nclass 017,b,1,2,validate\n",
    )
    for number_of_clip, name in enumerate("ab"):
        write(tmp_path / "val" / f"{name}_000001_000002.mp4", clips[number_of_clip, "mp4"])
    prepare_dataset(dataset, tmp_path, tmp_path / "out", "val")
    assert rows(tmp_path / "out") == [("a_000001_000002", 500), ("b_000001_000002", 17)]

    write(tmp_path / "annotations" / "train.csv", train.replace("class 003", "class 004"))
    with pytest.raises(InputError, match=rf"train\.csv: names {number - 1} classes, expected {number}.*--class_names"):
        prepare_dataset(dataset, tmp_path, tmp_path / "short", "val")
    (tmp_path / "annotations" / "train.csv").unlink()
    with pytest.raises(InputError, match=r"training list not found; expected train\.csv"):
        prepare_dataset(dataset, tmp_path, tmp_path / "none", "val")
    prepare_dataset(dataset, tmp_path, tmp_path / "subset", "val", class_names=["class 500", "class 017"])
    assert [label for _, label in rows(tmp_path / "subset")] == [0, 1]


def test_a_test_list_without_labels(tmp_path, clips):
    write(tmp_path / "test.csv", "youtube_id,time_start,time_end,split\na,1,2,test\n")
    write(tmp_path / "test" / "a_000001_000002.mp4", clips[0, "mp4"])
    report = prepare_dataset("kinetics400", tmp_path, tmp_path / "out", "test")
    assert rows(tmp_path / "out") == [("a_000001_000002", -1)]
    assert report["list_sha256"] == hash_of(("a_000001_000002", ""))
    with pytest.raises(InputError, match="no label"):
        open_labelled(tmp_path / "out")


# Something-Something v2.

TEMPLATES = {
    "101": "Wiping [something] off of [something]",
    "7": "Approaching [something] with your camera",
    "33": "Holding [something] over [something]",
    "4": "Holding [something]",
}


SSV2_LABELS = {"101": 173, "7": 0, "33": 20}


def write_ssv2(root: Path, clips, prefix: str = "something-something-v2-") -> None:
    entries = [
        {"id": name, "label": "as said by the worker", "template": template, "placeholders": ["a cup"]}
        for name, template in TEMPLATES.items()
    ]
    write(root / f"{prefix}validation.json", entries)
    write(root / f"{prefix}train.json", [{"id": "55", "template": "Holding [something]"}])
    labels = {name: str(index) for index, name in enumerate(read_official_class_names("ssv2"))}
    write(root / f"{prefix}labels.json", labels)
    folder = root / "20bn-something-something-v2"
    for number, name in enumerate(["101", "7", "33", "55", "56"]):
        write(folder / f"{name}.webm", clips[number, "webm"])


@pytest.mark.parametrize("prefix", ["something-something-v2-", "", "labels/"])
def test_something_something(tmp_path, clips, prefix):
    write_ssv2(tmp_path, clips, prefix)
    report = prepare_dataset("ssv2", tmp_path, tmp_path / "out", "val", check="decode")
    assert rows(tmp_path / "out") == list(SSV2_LABELS.items())
    # The video of the training list is in the same folder; nobody lists the last one.
    assert problems(tmp_path / "out") == {("missing", "4"), ("not listed", "56")}
    assert (report["listed"], report["missing"], report["not_listed"]) == (4, 1, 1)
    source = open_labelled(tmp_path / "out")
    assert read_numbers(MediaLoader().read_frames(source[2], lambda reader: [0, 2])) == [20, 22]
    with av.open(source[2].name) as container:
        assert container.streams.video[0].codec_context.name == "vp9"


def test_broken_webm_files(tmp_path, clips):
    write_ssv2(tmp_path, clips)
    folder = tmp_path / "20bn-something-something-v2"
    write(folder / "101.webm", clips[0, "webm"][:200])
    write(folder / "7.webm", b"")
    report = prepare_dataset("ssv2", tmp_path, tmp_path / "out", "val")
    assert rows(tmp_path / "out") == [("33", 20)]
    assert report["unreadable"] == 2


def test_something_something_test_list_without_templates(tmp_path, clips):
    write_ssv2(tmp_path, clips)
    write(tmp_path / "something-something-v2-test.json", [{"id": "56"}, {"id": "1420"}])
    report = prepare_dataset("ssv2", tmp_path, tmp_path / "out", "test")
    assert rows(tmp_path / "out") == [("56", -1)]
    # The other files belong to the lists of training and validation.
    assert (report["missing"], report["not_listed"]) == (1, 0)


def test_a_label_file_in_another_order(tmp_path, clips):
    write_ssv2(tmp_path, clips)
    labels = {name: str(index) for index, name in enumerate(reversed(read_official_class_names("ssv2")))}
    write(tmp_path / "something-something-v2-labels.json", labels)
    with pytest.raises(
        InputError, match=r"v2-labels\.json: 'Wiping something off of something' has the index 0, expected 173"
    ):
        prepare_dataset("ssv2", tmp_path, tmp_path / "out", "val")


# Moments in Time.


def write_moments(root: Path, clips) -> None:
    # Not in alphabetical order: the file's index counts.
    write(root / "moments_categories.txt", "wrestling,1\nadult+female+singing,0\nboating,2\n")
    write(
        root / "validationSet.csv",
        "wrestling/yt-1_2.mp4,wrestling,3,0\nboating/flickr-1.mp4,boating,2,1\n"
        "adult+female+singing/a.mp4,adult+female+singing,3,0\nboating/gone.mp4,boating,3,0\n",
    )
    for number, name in enumerate(
        ["wrestling/yt-1_2", "boating/flickr-1", "adult+female+singing/a", "boating/yt-1_2"]
    ):
        write(root / "validation" / f"{name}.mp4", clips[number, "mp4"])


def test_moments_in_time(tmp_path, clips):
    write_moments(tmp_path, clips)
    prepare_dataset("moments", tmp_path, tmp_path / "out", "val")
    assert rows(tmp_path / "out") == [
        ("wrestling/yt-1_2.mp4", 1),
        ("boating/flickr-1.mp4", 2),
        ("adult+female+singing/a.mp4", 0),
    ]
    assert problems(tmp_path / "out") == {("missing", "boating/gone.mp4"), ("not listed", "boating/yt-1_2.mp4")}
    assert open_labelled(tmp_path / "out").class_names == ["adult+female+singing", "wrestling", "boating"]


# Images.


def test_imagenet_folders(tmp_path):
    # Of the 1,000 folders, only these are left.
    for number, name in enumerate(["n15075141/n15075141_9", "n01440764/n01440764_18", "n02123045/n02123045_7"]):
        write(tmp_path / "train" / f"{name}.JPEG", picture(10 * number))
    write(tmp_path / "train" / "n02123045" / "n02123045_8.JPEG", picture(90)[:100])
    write(tmp_path / "train" / "n02123045" / "n02123045_9.JPEG", b"<html>not found</html>")
    write(tmp_path / "train" / "loose.JPEG", picture(50))
    report = prepare_dataset("imagenet", tmp_path, tmp_path / "out", "train")
    assert rows(tmp_path / "out") == [("n01440764_18", 0), ("n02123045_7", 281), ("n15075141_9", 999)]
    assert problems(tmp_path / "out") == {
        ("unreadable", "n02123045_8"),
        ("unreadable", "n02123045_9"),
        ("not listed", "loose"),
    }
    assert (report["num_classes"], report["classes_without_files"]) == (1000, 997)
    source = open_labelled(tmp_path / "out")
    pixel = MediaLoader().read_frames(source[2], lambda reader: [0])[0, 0, 5, 5].item()
    assert pixel <= 3 and source[2].name.endswith("n15075141_9.JPEG")

    write(tmp_path / "train" / "n00000001" / "a.JPEG", picture(0))
    with pytest.raises(InputError, match=r"train/n00000001: unknown class 'n00000001', expected one of 1000"):
        prepare_dataset("imagenet", tmp_path, tmp_path / "unknown", "train")


def test_imagenet_validation_images_without_folders(tmp_path):
    write(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG", picture(0))
    with pytest.raises(InputError, match=r"expected folders of classes \(CLASS_NAME/FILE\), found none"):
        prepare_dataset("folder", tmp_path / "val", tmp_path / "out")
    with pytest.raises(InputError, match=r"val: expected folders of classes \(n01440764, n01443537, \.\.\.\)"):
        prepare_dataset("imagenet", tmp_path, tmp_path / "out", "val")


def image_table(class_names: list[str], label_type=None) -> datasets.Dataset:
    images = [{"path": f"ILSVRC2012_val_0000000{n}_n01440764.JPEG", "bytes": picture(40 * n)} for n in range(3)]
    images.append({"path": "ILSVRC2012_val_00000009_n01440764.JPEG", "bytes": picture(0)[:50]})
    return datasets.Dataset.from_dict(
        {"image": images, "label": [5, 999, 0, 3]},
        features=datasets.Features(
            {"image": datasets.Image(), "label": label_type or datasets.ClassLabel(names=class_names)}
        ),
    )


def test_imagenet_as_parquet(tmp_path):
    class_names = [f"name of {synset}" for synset in read_official_class_names("imagenet")]
    (tmp_path / "data").mkdir()
    image_table(class_names).to_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet")
    image_table(class_names).select([0]).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    expected = [("ILSVRC2012_val_00000000", 5), ("ILSVRC2012_val_00000001", 999), ("ILSVRC2012_val_00000002", 0)]
    file = tmp_path / "data" / "validation-00000-of-00001.parquet"
    for number, root in enumerate([tmp_path, file]):
        output = tmp_path / f"out{number}"
        report = prepare_dataset("imagenet", root, output, "val", num_proc=2)
        assert rows(output) == expected
        assert report["list_sha256"] == hash_of(*((name, class_names[label]) for name, label in expected))
        assert problems(output) == {("unreadable", "ILSVRC2012_val_00000009")}
    source = open_labelled(tmp_path / "out0")
    assert source.class_names == class_names
    reds = [MediaLoader().read_frames(source[row], lambda reader: [0])[0, 0].float().mean().item() for row in range(3)]
    assert reds == pytest.approx([0, 40, 80], abs=3)


def test_tables_that_are_not_imagenet(tmp_path):
    image_table([], datasets.Value("int64")).to_parquet(tmp_path / "numbers.parquet")
    with pytest.raises(
        InputError, match=r"numbers\.parquet: expected a column of type Image and one of type ClassLabel"
    ):
        prepare_dataset("imagenet", tmp_path / "numbers.parquet", tmp_path / "out", "val")
    shuffled = read_official_class_names("imagenet")[::-1]
    image_table(shuffled).to_parquet(tmp_path / "shuffled.parquet")
    with pytest.raises(
        InputError, match=r"shuffled\.parquet: expected the 1,000 classes of ImageNet-1K in their order"
    ):
        prepare_dataset("imagenet", tmp_path / "shuffled.parquet", tmp_path / "out", "val")


def test_imagenet_that_cannot_be_had(tmp_path):
    with (
        unreachable_hub(),
        pytest.raises(InputError, match="no such folder, and no dataset of that name could be loaded"),
    ):
        prepare_dataset("imagenet", "some-user/no-such-dataset", tmp_path / "out", "val")
    with pytest.raises(InputError, match="/gone: no such file or folder"):
        prepare_dataset("imagenet", tmp_path / "gone", tmp_path / "out", "val")
    write(tmp_path / "broken.parquet", b"PAR1 not")
    with pytest.raises(InputError, match=r"broken\.parquet: the split 'validation' could not be opened"):
        prepare_dataset("imagenet", tmp_path / "broken.parquet", tmp_path / "out", "val")


PLACES_CATEGORIES = "/a/airfield 0\n/a/apartment_building/outdoor 2\n/b/badlands 1\n"


@pytest.mark.parametrize("size", ["large", "256"])
def test_places365(tmp_path, size):
    write(tmp_path / "categories_places365.txt", PLACES_CATEGORIES)
    names = [
        "/a/apartment_building/outdoor/00000001.jpg 2",
        "/a/airfield/00000001.jpg 0",
        "/b/badlands/00000009.jpg 1",
    ]
    write(tmp_path / "places365_train_standard.txt", "\n".join(names) + "\n")
    write(tmp_path / f"data_{size}" / "a" / "apartment_building" / "outdoor" / "00000001.jpg", picture(10))
    write(tmp_path / f"data_{size}" / "b" / "badlands" / "00000009.jpg", picture(20))
    prepare_dataset("places365", tmp_path, tmp_path / "train", "train")
    assert rows(tmp_path / "train") == [
        ("a/apartment_building/outdoor/00000001.jpg", 2),
        ("b/badlands/00000009.jpg", 1),
    ]
    assert problems(tmp_path / "train") == {("missing", "a/airfield/00000001.jpg")}
    assert open_labelled(tmp_path / "train").class_names == [
        "/a/airfield",
        "/b/badlands",
        "/a/apartment_building/outdoor",
    ]

    write(tmp_path / "places365_val.txt", "Places365_val_00000001.jpg 1\nPlaces365_val_00000002.jpg 0\n")
    for number in (1, 2):
        write(tmp_path / f"val_{size}" / f"Places365_val_0000000{number}.jpg", picture(30 * number))
    prepare_dataset("places365", tmp_path, tmp_path / "val", "val")
    assert rows(tmp_path / "val") == [("Places365_val_00000001.jpg", 1), ("Places365_val_00000002.jpg", 0)]


def test_both_sizes_of_places365_ask_for_one(tmp_path):
    write(tmp_path / "categories_places365.txt", PLACES_CATEGORIES)
    write(tmp_path / "places365_val.txt", "Places365_val_00000001.jpg 1\n")
    for size in ("large", "256"):
        write(tmp_path / f"val_{size}" / "Places365_val_00000001.jpg", picture(30))
    with pytest.raises(InputError, match=r"several .*val_large, .*val_256\. Choose with --media"):
        prepare_dataset("places365", tmp_path, tmp_path / "out", "val")
    prepare_dataset("places365", tmp_path, tmp_path / "out", "val", media=tmp_path / "val_256")
    (image,) = datasets.load_from_disk(str(tmp_path / "out"))["image"]
    assert image == {"path": f"{tmp_path}/val_256/Places365_val_00000001.jpg", "bytes": None}


# Plain folders.


def test_a_labelled_folder(tmp_path, clips):
    for number, name in enumerate(["wash/a.mp4", "wash/b.webm", "jump/c.mp4", "jump/deep/d.mp4"]):
        write(tmp_path / "data" / name, clips[number, name.rsplit(".")[1]])
    (tmp_path / "data" / "empty").mkdir()
    report = prepare_dataset("folder", tmp_path / "data", tmp_path / "out")
    assert rows(tmp_path / "out") == [("jump/c.mp4", 0), ("wash/a.mp4", 1), ("wash/b.webm", 1)]
    assert problems(tmp_path / "out") == {("not listed", "jump/deep/d.mp4")}
    assert report["list_sha256"] == hash_of(("wash/a.mp4", "wash"), ("wash/b.webm", "wash"), ("jump/c.mp4", "jump"))
    prepare_dataset("folder", tmp_path / "data", tmp_path / "given", class_names=["wash", "sing", "jump", "empty"])
    assert rows(tmp_path / "given") == [("jump/c.mp4", 2), ("wash/a.mp4", 0), ("wash/b.webm", 0)]


def test_the_classes_of_a_split_are_those_of_training(tmp_path):
    for name in ["train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "val/c/2.jpg"]:
        write(tmp_path / name, picture(0))
    prepare_dataset("folder", tmp_path, tmp_path / "out", "val")
    assert rows(tmp_path / "out") == [("c/2.jpg", 2)]
    write(tmp_path / "val" / "d" / "3.jpg", picture(0))
    with pytest.raises(InputError, match="val/d: unknown class 'd', expected one of 3"):
        prepare_dataset("folder", tmp_path, tmp_path / "unknown", "val")


def test_videos_and_images_want_folders_of_their_own(tmp_path, clips):
    write(tmp_path / "data" / "a" / "1.jpg", picture(0))
    write(tmp_path / "data" / "a" / "1.mp4", clips[0, "mp4"])
    with pytest.raises(InputError, match="both videos and images"):
        prepare_dataset("folder", tmp_path / "data", tmp_path / "out")


# What the user can mend.

GOOD_LIST = "label,youtube_id,time_start,time_end,split\nzumba,a,1,2,val\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"val\.csv, line 1: expected the columns youtube_id, time_start, time_end, label"),
        ("label,youtube_id\nzumba,a\n", r"val\.csv, line 1: .*; time_start, time_end missing"),
        (GOOD_LIST.split("zumba")[0], r"val\.csv: lists no files; expected names like ID_SSSSSS_EEEEEE\.mp4"),
        (GOOD_LIST + "zumbaa,b,1,2,val\n", r"val\.csv, line 3: unknown class 'zumbaa', .* 400: .* mean 'zumba'\?"),
        (GOOD_LIST + ",b,1,2,val\n", r"val\.csv, line 3: expected a class"),
        (GOOD_LIST + "zumba,b,1.5,2,val\n", r"val\.csv, line 3: .*whole seconds.*'1\.5'"),
        (GOOD_LIST + "zumba,b,1,2\n", r"val\.csv, line 3: expected 5 fields"),
        (GOOD_LIST + "zumba,b,1,2,val,0,0\n", r"val\.csv, line 3: expected 5 fields"),
        (GOOD_LIST + "zumba,b,1,2,train\n", r"val\.csv, line 3: is of the split 'train'; expected the list of 'val'"),
        (b"label,\xff\xfe", r"val\.csv: cannot be read as a list"),
        (GOOD_LIST.replace("zumba,a", "zumba,gone"), r"val: none of the 1 files that .*val\.csv lists is there"),
        (
            GOOD_LIST.replace("zumba,a", "zumba,broken"),
            r"None of the 1 files .* can be read\. The first: .*broken_000001",
        ),
    ],
)
def test_kinetics_lists_that_are_wrong(tmp_path, clips, content, message):
    write(tmp_path / "val.csv", content)
    write(tmp_path / "val" / "a_000001_000002.mp4", clips[0, "mp4"])
    write(tmp_path / "val" / "broken_000001_000002.mp4", b"broken")
    with pytest.raises(InputError, match=message):
        prepare_dataset("kinetics400", tmp_path, tmp_path / "out", "val")
    assert sorted(os.listdir(tmp_path)) == ["val", "val.csv"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": "1"', r"validation\.json, line 1: is not valid JSON"),
        ({"id": "1"}, r"validation\.json: expected a list of entries, got dict"),
        ([{"id": "1", "template": "Holding [something]"}, {"id": "2"}], r"validation\.json, entry 2: .* missing"),
        ([{"template": "Holding [something]"}], r'validation\.json, entry 1: expected an object with "id"'),
        (
            [{"id": "1", "template": "Hiding [something]"}],
            r"entry 1: unknown class 'Hiding something', expected one of 174",
        ),
    ],
)
def test_something_something_lists_that_are_wrong(tmp_path, content, message):
    write(tmp_path / "validation.json", content)
    with pytest.raises(InputError, match=message):
        prepare_dataset("ssv2", tmp_path, tmp_path / "out", "val")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"moments_categories.txt": "boating;0\n"}, r"moments_categories\.txt, line 1: expected NAME,INDEX"),
        (
            {"moments_categories.txt": "boating,0\nsinging,0\n"},
            r"moments_categories\.txt, line 2: .*each of them once",
        ),
        (
            {"moments_categories.txt": "boating,0\nsinging,2\n"},
            r"moments_categories\.txt: expected the indices 0 to N-1",
        ),
        (
            {"validationSet.csv": "boating/flickr-1.mp4\n"},
            r"validationSet\.csv, line 1: expected class/file\.mp4,label",
        ),
        ({"validationSet.csv": "a/b.mp4,rowing,1,1\n"}, r"validationSet\.csv, line 1: unknown class 'rowing'"),
    ],
)
def test_moments_lists_that_are_wrong(tmp_path, clips, files, message):
    write_moments(tmp_path, clips)
    for name, content in files.items():
        write(tmp_path / name, content)
    with pytest.raises(InputError, match=message):
        prepare_dataset("moments", tmp_path, tmp_path / "out", "val")


@pytest.mark.parametrize("line", ["Places365_val_00000002.jpg", "Places365_val_00000002.jpg 3", "a.jpg -1"])
def test_places_lists_that_are_wrong(tmp_path, line):
    write(tmp_path / "categories_places365.txt", PLACES_CATEGORIES)
    write(tmp_path / "places365_val.txt", f"Places365_val_00000001.jpg 1\n{line}\n")
    with pytest.raises(InputError, match=r"places365_val\.txt, line 2: expected a path and a class index from 0 to 2"):
        prepare_dataset("places365", tmp_path, tmp_path / "out", "val")


def test_lists_folders_and_splits_that_are_not_there(tmp_path, clips):
    with pytest.raises(
        InputError, match=r"list of the split 'val' not found; expected annotations/val\.csv or .*--annotations"
    ):
        prepare_dataset("kinetics400", tmp_path, tmp_path / "out", "val")
    with pytest.raises(InputError, match=r"gone\.csv: cannot be read as a list"):
        prepare_dataset("kinetics400", tmp_path, tmp_path / "out", "val", annotations=tmp_path / "gone.csv")
    write(tmp_path / "val.csv", GOOD_LIST)
    with pytest.raises(InputError, match="folder of the split 'val' not found; expected val or validate"):
        prepare_dataset("kinetics400", tmp_path, tmp_path / "out", "val")
    with pytest.raises(InputError, match="expected a folder of media files"):
        prepare_dataset("kinetics400", tmp_path, tmp_path / "out", "val", media=tmp_path / "val.csv")
    with pytest.raises(InputError, match="Moments in Time has the splits train, val, got test"):
        prepare_dataset("moments", tmp_path, tmp_path / "out", "test")


def test_a_list(tmp_path, clips, caplog):
    media = tmp_path / "media"
    for number, name in enumerate(["a b/1.mp4", "2.mp4", "3.mp4", "other.mp4"]):
        write(media / name, clips[number, "mp4"])
    (tmp_path / "train.csv").write_text(f"path,label\na b/1.mp4,wash\n./2.mp4,jump\n{media}/3.mp4,wash\n4.mp4,run\n")
    report = prepare_dataset("list", media, tmp_path / "out", annotations=tmp_path / "train.csv")
    assert rows(tmp_path / "out") == [("a b/1.mp4", 2), ("2.mp4", 0), ("3.mp4", 2)]
    assert problems(tmp_path / "out") == {("missing", "4.mp4"), ("not listed", "other.mp4")}
    assert report["list_sha256"] == hash_of(("a b/1.mp4", "wash"), ("2.mp4", "jump"), ("3.mp4", "wash"))
    assert open_labelled(tmp_path / "out").class_names == ["jump", "run", "wash"]
    given = {"annotations": tmp_path / "train.csv", "class_names": ["wash", "run", "sing", "jump"]}
    prepare_dataset("list", media, tmp_path / "given", split="train", **given)
    assert rows(tmp_path / "given") == [("a b/1.mp4", 0), ("2.mp4", 3), ("3.mp4", 0)]

    (tmp_path / "numbers.txt").write_text("# indices\n2.mp4 1\n3.mp4 0\n")
    prepare_dataset("list", media, tmp_path / "numbers", annotations=tmp_path / "numbers.txt")
    assert rows(tmp_path / "numbers") == [("2.mp4", 1), ("3.mp4", 0)]
    (tmp_path / "paths.txt").write_text("2.mp4\n3.mp4\n")
    prepare_dataset("list", media, tmp_path / "paths", annotations=tmp_path / "paths.txt")
    assert rows(tmp_path / "paths") == [("2.mp4", -1), ("3.mp4", -1)]
    (tmp_path / "kinds.csv").write_text("path,kind\n2.mp4,a\n3.mp4,b\n")
    prepare_dataset("list", media, tmp_path / "kinds", annotations=tmp_path / "kinds.csv")
    assert (
        "has no column label or labels or class or class_name, but path, kind; so no item gets a label" in caplog.text
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "expected the list as --annotations FILE"),
        ("path,start\n1.mp4,2\n", "a list of parts of files"),
        ("1.mp4 0,1\n2.mp4 1\n", "may have several labels each"),
        ("1.mp4 0\n2.jpg 1\n", "names both videos and images"),
        ("1.mp4 0\n2.mp4 2\n", "has the class index 2, but there are 2 class names"),
        ("1.mp4 sing\n2.mp4 run\n", "unknown class 'sing'"),
    ],
)
def test_lists_that_are_no_table_of_files(tmp_path, text, reason):
    path = None if text is None else tmp_path / "train.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=reason):
        prepare_dataset("list", tmp_path, tmp_path / "out", annotations=path, class_names=["jump", "run"])
    with pytest.raises(InputError, match=r"--root .*gone: expected the folder that the list" if path else reason):
        prepare_dataset("list", tmp_path / "gone", tmp_path / "out", annotations=path)
