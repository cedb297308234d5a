"""Running the trials of a sweep: one on all cores by Ray Data, or several at a time by Ray Tune.

Trials that share a stage's results are one unit of work, except for ASHA, which stops each by itself.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

from raypipe.lookup import one_line
from raypipe.pipeline.foregrounds import Foreground
from raypipe.pipeline.graph import probe
from raypipe.pipeline.job import fetch_weights
from raypipe.pipeline.label import attempt
from raypipe.runtime import cores
from raypipe.runtime.interruption import postponed
from raypipe.runtime.progress import Counts, Progress, count_of_images
from raypipe.storage import Folder, Locked, open_table
from raypipe.sweep import ranking
from raypipe.sweep.scoring import score
from raypipe.sweep.together import groups, label_together, share_stages
from raypipe.sweep.trials import Trial, has_labelled, read_state, with_images, write_state

log = logging.getLogger("raypipe")
FIRST_RUNG = 4  # ASHA compares trials first after one in so many of the images
KEEP = 2  # ASHA lets the better 1 / KEEP of the trials pass a rung, and the next comes after KEEP times the images
RECOUNT = 5.0  # seconds between looks at what the trials have committed
RELEASE = 120.0  # seconds for workers of a killed sweep to let go of their trials


def run_trials(planned: list[Trial], *, local: bool = False) -> None:
    """Label what is not labelled yet, on Ray, and score what is not scored yet. How each ended is in its trial.json.

    local: one after the other in this process, without Ray. Raises ValueError or RuntimeError with the method's message
    when nothing of the sweep was ever labelled and no trial can load the method: then it is not a swept value that is
    wrong.
    """
    todo, done = [], []
    for trial in planned:
        (done if _is_over(trial) else todo).append(trial)
    for trial in done:
        score(trial, threads=cores.count() + 1)
        write_state(trial, status=read_state(trial.output)["status"])
    if not todo:
        return
    each, total = (count_of_images(sum(len(trial.images) for trial in trials)) for trials in (todo[:1], todo))
    log.info("%s of %s trials to run, each on %s: %s in all", len(todo), len(planned), each, total)
    if todo[0].sweep.search == "asha":  # earlier ones report again, so that others are compared with them
        run_on_tune([*done, *todo])
    elif local or len(todo) == 1:
        for trial in todo:
            run_alone(trial, on_ray=not local)
    else:
        run_on_tune(todo)


def _is_over(trial: Trial) -> bool:
    status = read_state(trial.output).get("status")
    if status == "stopped":
        return trial.sweep.search == "asha"
    return status == "done" and not len(trial.run.plan(trial.images))


def run_alone(trial: Trial, *, on_ray: bool) -> None:
    """One trial on all cores and GPUs, by Ray Data, or in a plain loop here."""
    try:
        advance(trial, len(trial.images), on_ray=on_ray, threads=cores.count() + 1)
    except Locked:
        raise
    except Exception as error:
        if trial.run.configuration() is None and not has_labelled(Folder(trial.sweep.output)):  # loading it failed
            raise
        write_state(trial, status="failed", error=f"{type(error).__name__}: {one_line(error)}")


def run_on_tune(todo: list[Trial]) -> None:
    """Several trials at a time, each in a process of its own, by Ray Tune. Leaves how each ended in its trial.json."""
    from raypipe.runtime import cluster

    sweep = todo[0].sweep
    refuse_unloadable(todo, lambda trial: fetch_weights(trial.job, trial.work))
    with cluster.connected(stall=1800.0):
        cluster.warn_of_local_paths(input=sweep.input, labels=sweep.labels, output=sweep.output)
        resources = cluster.resources(gpus=todo[0].work.gpus, device=sweep.device, actors=sweep.actors)
        device, gpus = resources.device, resources.gpus
        refuse_unloadable(todo, lambda trial: probe(replace(trial.work, device=device), gpus=gpus))
        todo, total = share_foreground(todo), sum(len(trial.images) for trial in todo)
        log.info("%s to label: %s in each of %s trials", count_of_images(total), len(todo[0].images), len(todo))
        count = count_commits(todo)
        with Progress(total, count, before=count().rows):
            units = [[trial] for trial in todo] if sweep.search == "asha" else groups(todo)
            ended_early = run_groups(units, resources)
            if alone := [[trial] for group in ended_early for trial in group]:
                log.warning("%s trials that share a network ended together; each is tried alone", len(alone))
                run_groups(alone, resources)


def run_groups(todo: list[list[Trial]], resources) -> list[list[Trial]]:
    """Each group of trials in a process of its own, several at a time. Returns those of several trials that failed.

    How each other trial ended is in its trial.json.
    """
    ended_early = []
    with tempfile.TemporaryDirectory() as scratch, postponed() as handle_signal:
        results = tuner_of_groups(todo, resources, scratch, at_step=handle_signal).fit()
    for result in results:
        group = todo[result.config["index"]]
        if len(group) > 1:
            ended_early += [group] if result.error is not None else []
            continue
        (trial,) = group
        state = read_state(trial.output)
        if result.error is not None and state.get("status") != "failed":
            text = f"its process died: {type(result.error).__name__}: {one_line(result.error)}"
            write_state(trial, status="failed", error=text)
        elif state.get("status") == "running":
            write_state(trial, status="stopped")
    return ended_early


def refuse_unloadable(todo: list[Trial], attempt_to: Callable[[Trial], None]) -> None:
    """Try the method with one setting after the other until one succeeds; raise the first one's error if none does.

    A sweep that has labelled anything before is spared this.
    """
    if has_labelled(Folder(todo[0].sweep.output)):
        return
    errors = []
    for trial in todo:
        try:
            return attempt_to(trial)
        except (ValueError, RuntimeError, FileNotFoundError) as error:
            errors.append(error)
    raise errors[0]


def count_commits(todo: list[Trial]) -> Callable[[], Counts]:
    """A function that gives the rows and error rows committed so far; it reads each commit record once."""
    folders, counts, next_look = [trial.run.folder for trial in todo], {}, 0.0

    def committed() -> Counts:
        nonlocal next_look
        if time.monotonic() >= next_look:
            for folder, name in [(each, name) for each in folders for name in each.files("_commits")]:
                if (folder.uri, name) not in counts and (content := folder.read("_commits", name)):
                    errors = open_table(content).read(columns=["error"])["error"].to_pylist()
                    counts[folder.uri, name] = len(errors), sum(map(bool, errors))
            next_look = time.monotonic() + RECOUNT
        return Counts(*map(sum, zip((0, 0), *counts.values(), strict=True)))

    return committed


def tuner_of_groups(todo: list[list[Trial]], resources, scratch: str, *, at_step: Callable[[], None]):
    """The Tuner of some groups of trials. scratch, at_step: as of `tuner`."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    first, scheduler = todo[0][0], None
    counts = [len(first.images)]
    if first.sweep.search == "asha" and len(rungs(*counts)) > 1:
        counts = rungs(*counts)
        milestones = {"max_t": counts[-1], "grace_period": counts[0], "reduction_factor": KEEP}
        scheduler = ASHAScheduler("images", "score", "max", **milestones)
    share = max(1, (resources.max_actors or 1) // len(todo))  # few groups leave cores free, which their networks use
    threads = share if any(len(group) > 1 for group in todo) else 1
    run = tune.with_parameters(run_group, todo=todo, counts=counts, threads=threads)
    each, at_once = {"cpu": threads, "gpu": resources.gpus}, resources.max_actors
    return tuner(run, len(todo), each, at_once=at_once, scratch=scratch, at_step=at_step, scheduler=scheduler)


def tuner(
    run: Callable[[dict], None],
    count: int,
    resources: dict[str, float],
    *,
    at_once: int | None,
    scratch: str,
    at_step: Callable[[], None],
    scheduler=None,
):
    """The Tuner of `count` calls of `run`, each with {"index": its number} in a process of its own.

    resources: `cpu` and `gpu` of one. at_once: how many at a time; None = as many as there is room for. scratch: a
    folder for the Tuner's own files, which nobody needs afterwards. at_step: called many times meanwhile; what it
    raises ends them, if it is no Exception, without any wait.
    """
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints tables even when told to be quiet
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # its tables are not read, and TensorBoard's refuse -inf
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # ours ends the sweep so that it can be resumed
    from ray import tune

    class AtStep(tune.Callback):
        def on_step_begin(self, iteration, trials, **rest) -> None:
            at_step()

        def __reduce__(self) -> tuple:
            return tune.Callback, ()  # in Tune's own record of the sweep

    logging.getLogger("ray.tune").setLevel("CRITICAL")  # failed trials are told at the end
    return tune.Tuner(
        tune.with_resources(run, resources),
        param_space={"index": tune.grid_search(list(range(count)))},
        tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=at_once, reuse_actors=True),
        run_config=tune.RunConfig(name="sweep", storage_path=scratch, verbose=0, callbacks=[AtStep()]),
    )


def rungs(count: int) -> list[int]:
    """After how many of the images ASHA compares trials: a quarter, twice that, all. The scheduler's own milestones."""
    first = math.ceil(count / FIRST_RUNG)
    return sorted({first, min(count, KEEP * first), count})


def run_group(config: dict, todo: list[list[Trial]], counts: list[int], threads: int) -> None:
    """A trial, or some that share a stage's results, in a worker of Ray Tune."""
    from ray import tune

    from raypipe.pipeline import workers

    workers.use_threads(threads)
    group = todo[config["index"]]
    if len(group) == 1:
        run_trial(*group, counts)
    else:
        advance_together(group, threads=threads)
        tune.report({"images": counts[-1]})  # else it prints that nothing was


def run_trial(trial: Trial, counts: list[int]) -> None:
    """One trial, which Ray Tune may stop at each report.

    One that an earlier sweep stopped reports again as far as it came, and no further.
    """
    from ray import tune

    was_stopped = read_state(trial.output).get("status") == "stopped" and len(counts) > 1
    try:
        for count in counts:
            if was_stopped and len(trial.run.plan(trial.images.slice(0, count))):
                return
            advance(trial, count)
            tune.report({"images": count, "score": score_so_far(trial, count)})
    except Exception as error:
        write_state(trial, status="failed", error=f"{type(error).__name__}: {one_line(error)}")
        raise


def score_so_far(trial: Trial, count: int) -> float:
    """The metric of the best post-processing setting on the first `count` images, negated where low is good."""
    metric, goal = trial.sweep.metric, trial.sweep.goal
    found, _ = ranking.read_trial(trial.output, task=trial.task, images=trial.images.slice(0, count))
    chosen = ranking.best([replace(each, status="done") for each in found], metric, goal)
    return chosen.means[metric] * (1 if goal == "max" else -1) if chosen else float("-inf")  # every image failed


def share_foreground(todo: list[Trial]) -> list[Trial]:
    """Compute a GrabCut foreground that all trials have in common once, and let them read it."""
    kinds, first = {(str(trial.foreground), trial.segmenter.seed) for trial in todo}, todo[0]
    if len(kinds) > 1 or first.foreground is None or first.foreground.kind != "grabcut":
        return todo
    log.info("first the foreground, which all trials share")
    output, grabcut = Folder(first.sweep.output).location("foreground").uri, first.work.finder
    common = replace(first, output=output, segmenter=grabcut, refiner=None, posts=(), foreground=None)
    advance(common, len(common.images), on_ray=True)
    return with_images([replace(trial, foreground=Foreground("run", output)) for trial in todo], common)


# workers of a sweep that was killed a moment ago may still hold its trials
until_let_go = {"retry": retry_if_exception_type(Locked), "wait": wait_fixed(2), "stop": stop_after_delay(RELEASE)}
patiently = retry(**until_let_go, reraise=True)


@patiently
def advance(trial: Trial, count: int, *, on_ray: bool = False, threads: int = 1) -> None:
    """Label and score the first `count` images, as far as that is not done yet.

    on_ray: by Ray Data, else in a plain loop here. Writes the trial's folder; what was committed stays when it is
    interrupted. Raises what labelling raises.
    """
    start, among = time.monotonic(), trial.images.slice(0, count)
    if len(trial.run.plan(among)):
        job = replace(trial.job, local=not on_ray)
        attempt(job, trial.work, trial.run, trial.images, settings=trial.frozen, among=among)
    score(trial, threads=threads)
    _advanced(trial, time.monotonic() - start)


def advance_together(group: list[Trial], *, threads: int) -> None:
    """Label and score all images of trials that share a stage's results. Each gets an equal part of the seconds."""
    start = time.monotonic()
    patiently(label_together)(group, share_stages([trial.segmenter for trial in group]))
    for trial in group:
        score(trial, threads=threads)
    for trial in group:
        _advanced(trial, (time.monotonic() - start) / len(group))


def _advanced(trial: Trial, seconds: float) -> None:
    is_done = len(trial.run.plan(trial.images)) == 0
    seconds += read_state(trial.output).get("seconds", 0.0)
    write_state(trial, status="done" if is_done else "running", seconds=seconds)
