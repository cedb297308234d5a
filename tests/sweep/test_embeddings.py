"""What a sweep measures of the names and embeddings of segments: as the runs store them."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from support.faulty import write_images
from support.naming import NamedMap, Naming, NamingMap
from support.sweepable import sweep_of
from support.tiny._clip import write_model
from support.tiny._sentences import write_sentences

from raypipe.evaluation.evaluate import Evaluate, evaluate
from raypipe.evaluation.tasks import naming
from raypipe.pipeline.job import Label
from raypipe.pipeline.label import label
from raypipe.refiners.guided import Guided
from raypipe.sweep.plan import plan, settled
from raypipe.sweep.ranking import read_trial
from raypipe.sweep.trials import Trial, labelled, with_images
from raypipe.sweep.tuning import advance


@pytest.mark.parametrize(
    ("segmenter", "refiner"), [(Naming(), None), (NamingMap(), None), (NamingMap(), Guided()), (NamedMap(), None)]
)
def test_measures_of_names_and_embeddings_are_what_evaluate_gives(tmp_path, segmenter, refiner):
    write_images(tmp_path / "photos", [9] * 3)
    (tmp_path / "labels").mkdir()
    for i in range(3):
        classes = np.repeat([1, 2], [10, 14])[:, None] * np.ones(32 + i, int)
        Image.fromarray(classes.astype(np.uint8)).save(tmp_path / f"labels/{i:04d}.png")
    models = {"sentence_model": str(write_sentences(tmp_path / "words")), "clip": str(write_model(tmp_path / "clip"))}
    task = naming.Naming(**models, tau_sbert=0.0, tau_clip=-1.0).of_classes("sky,grass")
    values, refine = [None, 0.8] if segmenter.soft else [None], refiner and "guided"
    job, *rest = settled(sweep_of(tmp_path, "threshold=None,0.8", refine=refine, metric="iou_st"), task)
    common = Trial(job, segmenter, refiner, *rest)
    (trial,) = with_images(plan(common, [{"threshold": value} for value in values]), labelled(common))
    advance(trial, 3)
    settings, _ = read_trial(trial.output, task=task, images=trial.images)
    for setting, threshold in zip(settings, values, strict=True):
        options = {"keep_embeddings": segmenter.embeds, "refine": refine, "local": True}
        run = Label(job.input, str(tmp_path / f"run-{threshold}"), **options)
        label(run, dataclasses.replace(segmenter, threshold=threshold), refiner)
        means = evaluate(Evaluate((run.output,), job.labels, task="naming"), task).means
        assert setting.means == means and means["iou_st"] is not None and means["iou_tt"] is not None
    assert settings[0].means != settings[-1].means or not segmenter.soft
