"""Small classifiers on disk, the views they see, and their predictions."""

from accelerate import Accelerator
from tiny_models import shake, tiny_config

from vicmae_hf import ViCMAEForVideoClassification
from vicmae_hf.data.media.reading import MediaLoader
from vicmae_hf.data.samples.views import ViewDataset, ViewProtocol, choose_preprocessing
from vicmae_hf.data.sources.labelled import open_labelled
from vicmae_hf.evaluation.prediction import predict_views
from vicmae_hf.processors import build_processors


NAMES = ["ant", "bee", "cow"]
# Of the folder, sorted, they are others than of the model.
MODEL_NAMES = ["cow", "ant", "bee"]


def labels_of(names):
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def save_classifier(folder, fps=None, model_class=ViCMAEForVideoClassification, **settings):
    model = shake(model_class(tiny_config(**labels_of(MODEL_NAMES), **settings))).eval()
    model.save_pretrained(folder)
    for processor in build_processors(model.config):
        processor.fps = fps
        processor.save_pretrained(folder)
    return model


def views_for(classifier, data, protocols=((1, 1),)):
    return ViewDataset(
        open_labelled(data, classifier.class_names),
        choose_preprocessing(classifier.processor),
        MediaLoader(),
        task=classifier.task,
        num_frames=classifier.num_frames,
        frames_per_second=classifier.frames_per_second,
        protocols=[ViewProtocol(*counts) for counts in protocols],
    )


def predict_all(model, dataset, batch_size=4, **options):
    return predict_views(Accelerator(cpu=True), model, dataset, batch_size=batch_size, num_workers=0, **options)
