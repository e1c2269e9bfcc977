"""Engine: a checkpoint on a device, ready to turn observations into action chunks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn, overload

import numpy as np

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    remedy = "pip install 'xr0-engine[cpu]', or 'xr0-engine[cuda]' for an NVIDIA GPU"
    raise ModuleNotFoundError(f"an Engine needs torch, which is not installed: {remedy}", name="torch") from None
from torch import Tensor

from xr0_engine.backend import resolve_backend, resolve_device, resolve_dtype
from xr0_engine.config import ModelConfig
from xr0_engine.exported.manifest import checkpoint_hash
from xr0_engine.exported.model import ExportedModel
from xr0_engine.fused.choice import choose, chosen
from xr0_engine.fused.graph import wait_for_stream
from xr0_engine.fused.lookahead import Underway
from xr0_engine.fused.model import FusedModel, reference_of
from xr0_engine.fused.tactics import tactics_for
from xr0_engine.model.adapter import Adapter
from xr0_engine.model.attention import Attention, labelled, watched
from xr0_engine.model.flow import Guidance
from xr0_engine.model.network import Network, StageClock, block_by_stages
from xr0_engine.model.weights import layers_in_8bit, load_model, read_index, resolve_checkpoint
from xr0_engine.model.xr0 import XR0Model, bends_of
from xr0_engine.robot.calls import Asked, Given, attempt, checked, chunks, given_prefix, start_noise, take
from xr0_engine.robot.embodiment import Embodiment, load_embodiment
from xr0_engine.robot.preprocess import Preprocessor
from xr0_engine.robot.tokenized import tokenized_inputs
from xr0_engine.types import (
    ActionChunk,
    Guide,
    Inference,
    KVBlock,
    ModelInputs,
    Observation,
    RobotInfo,
    TokenizedObservation,
)


class Engine:
    """Make one with `Engine.from_pretrained`. One call at a time: an engine is not shared between threads, nor with
    processes that are forked after its first call (RuntimeError), nor pickled (TypeError): each makes its own.

    Nothing that a program sets for torch changes a result: default dtype and device, autocast, autograd. A refused call
    (ValueError) changes nothing; the engine serves the next. backend: what runs the network; backend_reason: why, in
    one line. plausible_std: None, or how many standard deviations from the statistics' mean an action may be; a chunk
    with one that is further away is not given out (RuntimeError). To be set by whoever knows the robot: released
    checkpoints go to 5 and more at a gripper.
    """

    def __init__(
        self, model: Network, preprocess: Preprocessor, backend: str = "reference", backend_reason: str = ""
    ) -> None:
        self.model = model
        self.config: ModelConfig = model.config
        self.statistics = preprocess.statistics
        self.backend, self.backend_reason = backend, backend_reason
        self.plausible_std: float | None = None
        self._preprocess = preprocess
        self._process: int | None = None

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an Engine cannot be pickled or copied, it holds a device's memory: pass the checkpoint's path on and call "
            "Engine.from_pretrained there, or serve it (xr0 serve) and pass the URL"
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str = "auto",
        dtype: str = "bfloat16",
        backend: str = "auto",
        embodiment: str | Path | Embodiment | None = None,
        quantize: str | None = None,
        adapter: str | Path | None = None,
    ) -> Engine:
        """Load a checkpoint folder, or a Hugging Face hub id.

        device: auto (a CUDA GPU if there is one), cpu, cuda, cuda:N. dtype: bfloat16, float16 or float32, whatever the
        checkpoint stores. backend: reference, triton, or auto: on a GPU triton, if its kernels pass a self-check, which
        the first use on a machine makes and keeps, else reference. embodiment: profile name, YAML file or Embodiment
        for every observation; None picks the built-in profile by the observation's robot type. quantize: a recipe of
        docs/quantization.md, by which a checkpoint in 16 bits is rounded to 8 as it is read; None: as it is stored.
        adapter: a folder of `xr0 train export --adapter` of this base, merged as the base is read.
        Raises CheckpointError for a checkpoint that cannot be used, ValueError for a wrong argument,
        NotImplementedError for a backend that this machine lacks. Nothing is loaded before everything is checked.
        """
        chosen_dtype, chosen_device = resolve_dtype(dtype), resolve_device(device)
        by_name = resolve_backend(backend, chosen_device)
        if isinstance(embodiment, str | Path):
            embodiment = load_embodiment(embodiment)
        folder = resolve_checkpoint(path)
        tuned = None if adapter is None else Adapter.load(adapter)
        preprocess = Preprocessor.load(folder if tuned is None else tuned.folder, embodiment)
        if tuned is not None:
            tuned.check_base(folder, checkpoint_hash)
        layers = layers_in_8bit(folder, preprocess.config, quantize)
        if backend == "auto":
            choice = choose(chosen_device, dtype, folder, layers, quantize, None if tuned is None else tuned.folder)
        else:
            choice = chosen(by_name, chosen_device, preprocess.config, layers)
        table = (choice.table or tactics_for(chosen_device)) if choice.backend == "triton" else None
        is_8bit = bool(layers) and quantize is None
        stored, merges = read_index(folder, is_8bit), {}
        if tuned is not None:
            stored, merges = tuned.over(stored), tuned.merges()
        plain = load_model(preprocess.config, stored, chosen_device, chosen_dtype, layers, is_8bit, merges)
        network: Network = plain
        if table is not None:
            network = FusedModel(plain, choice.backend, table, graphs=chosen_device.type == "cuda")
        return cls(network, preprocess, choice.backend, choice.reason)

    @classmethod
    def from_export(
        cls,
        path: str | Path,
        device: str = "auto",
        backend: str = "auto",
        embodiment: str | Path | Embodiment | None = None,
    ) -> Engine:
        """An engine on what `xr0 export` wrote: the same calls, for the case that was exported.

        device: as in from_pretrained. backend: onnx (ONNX Runtime), tensorrt (engines built for this GPU), or auto:
        tensorrt where the folder has such engines, else onnx. embodiment: as in from_pretrained; None is the export's
        own. Other image sizes, views, batches, chunk lengths or longer prompts than the export's raise ValueError.
        Raises ValueError for a folder that cannot be used, NotImplementedError for what this machine does not run,
        RuntimeError for a missing library.
        """
        model = ExportedModel.load(Path(path), device, backend)
        profile = model.manifest.case.profile if embodiment is None else embodiment
        preprocess = Preprocessor.load(
            Path(path), load_embodiment(profile) if isinstance(profile, str | Path) else profile
        )
        preprocess.statistics = {name: preprocess.statistics[name] for name in model.manifest.robot_types}
        model.check_profile(preprocess)
        return cls(model, preprocess, model.backend, "it runs the export")

    @property
    def robot_types(self) -> tuple[str, ...]:
        """The robot types that the checkpoint has action statistics for."""
        return tuple(self.statistics)

    @property
    def max_prefix(self) -> int:
        """The longest prefix that the checkpoint was trained with. infer takes longer ones, up to T."""
        return self.config.head.max_prefix

    def embodiment(self, robot_type: str | None = None) -> Embodiment:
        """The profile used for a robot type (None: the checkpoint's only one)."""
        return self._preprocess.resolve(robot_type)[1]

    def robot_info(self, robot_type: str | None = None) -> RobotInfo:
        """How a robot type is driven (None: the checkpoint's only one), as a server tells it of the same checkpoint.

        Raises ValueError for a robot type without statistics or profile.
        """
        robot_type, profile = self._preprocess.resolve(robot_type)
        chunk_length, action_width = self.statistics[robot_type].mean.shape
        return profile.robot_info(chunk_length, action_width, self.max_prefix, self.config.head.state_length)

    def example(self, robot_type: str | None = None, image_size: tuple[int, int] = (480, 640)) -> Observation:
        """A random but valid observation, always the same, to warm up and to measure with."""
        return self._preprocess.example(robot_type, image_size)

    def warm_up(self, cases: Sequence[Observation | Sequence[Observation]]) -> None:
        """Run each case (an observation, or a batch of them) once, so that the first real call pays for no set-up."""
        for case in cases:
            self.infer([case] if isinstance(case, Observation) else case, seed=0)

    @overload
    def infer(
        self,
        observation: Observation,
        prefix: np.ndarray | None = None,
        noise: np.ndarray | None = None,
        seed: int | None = None,
        guide: Guide | None = None,
    ) -> ActionChunk: ...

    @overload
    def infer(
        self,
        observation: Sequence[Observation],
        prefix: Sequence[np.ndarray | None] | None = None,
        noise: np.ndarray | None = None,
        seed: int | Sequence[int | None] | None = None,
        guide: Sequence[Guide | None] | None = None,
    ) -> list[ActionChunk]: ...

    def infer(self, observation, prefix=None, noise=None, seed=None, guide=None):  # type: ignore[no-untyped-def]
        """The next action chunk; a batch of observations gives a list of chunks.

        prefix: (P, A) robot units, P <= T, the actions already committed, in the frame of this observation; they come
        back unchanged as the chunk's first P. With a batch: one per observation, each an array or None.
        noise: (T, A) float32, with a batch (B, T, A), where the flow starts; else seed (an int; row i of a batch uses
        seed + i; or a list with one for each, None for none) gives it; else it is drawn anew. guide: instead of a
        prefix, for checkpoints trained without: what the chunk is drawn toward (docs/realtime.md, modes); with a batch
        one per observation or None. Its flow runs by PyTorch's operators on every backend. Raises ValueError for a
        wrong input, NotImplementedError for a guide where takes_guides is False, before the model runs; RuntimeError
        for actions that are not finite, or not plausible if plausible_std is set: none of them leaves.
        """
        if isinstance(observation, Observation):
            return self._infer(Asked([observation], [prefix], noise, seed, [guide]))[0]
        return self._infer(Asked.batch(list(observation), prefix, noise, seed, guide))

    def infer_tokenized(
        self,
        observation: TokenizedObservation,
        prefix: np.ndarray | None = None,
        noise: np.ndarray | None = None,
        seed: int | None = None,
        guide: Guide | None = None,
    ) -> ActionChunk:
        """The next action chunk of an observation that came as tokens and patches; all else as in infer."""
        asked = Asked([observation], [prefix], noise, seed, [guide])
        return self._run(self._clock(), self._tokenized(observation), asked)[0]

    @property
    def takes_guides(self) -> bool:
        """Whether infer takes a guide, and attention is to be had: not from an export's graphs."""
        return isinstance(self.model, XR0Model | FusedModel)

    @property
    def infers_ahead(self) -> bool:
        """Whether infer_all works on two calls at once: on a GPU whose tactic table says so, with backend triton."""
        return isinstance(self.model, FusedModel) and self.model.lookahead is not None

    def infer_all(self, calls: Iterable[Inference | None]) -> Iterator[ActionChunk | Exception]:
        """The chunk of each call in turn, as infer gives it, bit by bit; in its place what the call raised, which
        leaves the others alone.

        Where infers_ahead, the next call is taken while one is at work: it is preprocessed and its images are encoded
        beside that one's flow. calls: None where there is none yet; as long as one is at work it is asked again. All
        else as in infer and infer_tokenized.
        """
        if not self.infers_ahead:
            yield from (attempt(self._alone, call) for call in calls if call is not None)
            return
        before: Underway | None = None
        for call in calls:
            if call is not None and call.guide is not None:
                if before is not None:
                    yield attempt(self._landed, before)
                before = None
                yield attempt(self._alone, call)
                continue
            current = None if call is None else attempt(self._launched, call)
            if before is not None and (current is not None or before.launched.is_done()):
                yield attempt(self._landed, before)
                before = None
            if isinstance(current, Exception):
                yield current
            elif current is not None:
                before = current
        if before is not None:
            yield attempt(self._landed, before)

    def prefill(self, observation: Observation | Sequence[Observation]) -> KVBlock:
        """What the DiT reads of an observation (or batch), kept so that several chunks can be sampled from it."""
        self._check_process()
        observations = [observation] if isinstance(observation, Observation) else list(observation)
        inputs = self._preprocess(observations, self.model.patch_buffer)
        return self.model.prefill(inputs, self.model.encode_images(inputs))

    def sample(
        self,
        kv_block: KVBlock,
        state: np.ndarray | Tensor,
        prefix: np.ndarray | Tensor | None = None,
        noise: np.ndarray | Tensor | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """One chunk per row of a KV block, (B, T, A) float32, in the model's units.

        state: (B, state_length, S); prefix: (B, P, A) in the model's units; noise: (B, T, A), else from seed as in
        infer. Raises ValueError for wrong shapes or values that are not finite.
        """
        self._check_process()
        head = self.config.head
        batch, length, width = kv_block.action_mask.shape
        state_ = checked("state", state, (batch, head.state_length, head.state_dim))
        padded, lengths = given_prefix(prefix, (batch, length, width))
        start = start_noise(noise, seed, (batch, length, width))
        return self.model.sample(kv_block, state_, start, padded, lengths)

    def attention(
        self,
        observation: Observation,
        prefix: np.ndarray | None = None,
        noise: np.ndarray | None = None,
        seed: int | None = None,
    ) -> Attention:
        """Where the action head looks while it samples the chunk that infer gives for the same arguments: weights of
        every layer, head and flow step, over named tokens; the head by PyTorch's operators on every backend. Errors as
        infer's; NotImplementedError where takes_guides is False."""
        plain = reference_of(self.model, "attention")
        inputs = self._preprocess([observation], self.model.patch_buffer)
        given = self._take(inputs, Asked([observation], [prefix], noise, seed, [None]))
        kv = block_by_stages(self.model, inputs)
        with watched(plain.head) as seen:
            plain.sample(kv, inputs.state, given.noise, given.prefix, given.prefix_length)
        views = [view.key for view in self.embodiment(observation.robot_type).views]
        return labelled(seen, inputs, int(given.prefix_length[0]), self.config, views)

    def _clock(self) -> StageClock:
        """Each mark waits for the work that was queued on a GPU before it."""
        return StageClock(partial(wait_for_stream, self.model.device))

    def _check_process(self) -> None:
        """After its first call an engine has threads, and on a GPU a context, that a fork does not take along: the next
        call there would wait for them for ever."""
        if self._process is None:
            self._process = os.getpid()
        elif self._process != os.getpid():
            raise RuntimeError(
                f"this engine has worked in process {self._process}, of which {os.getpid()} is a fork: make an engine "
                "in the new process, started by multiprocessing's `spawn`"
            )

    def _infer(self, asked: Asked) -> list[ActionChunk]:
        clock = self._clock()
        # What is no Observation is refused there.
        inputs = self._preprocess(asked.observations, self.model.patch_buffer)  # type: ignore[arg-type]
        return self._run(clock, inputs, asked)

    def _tokenized(self, observation: TokenizedObservation) -> ModelInputs:
        robot_type, profile = self._preprocess.resolve(observation.robot_type)
        views = [view.key for view in profile.views]
        statistics, prepare = self.statistics[robot_type], self._preprocess
        limits, per_view = prepare.limits, None
        if profile.history is not None:
            limits = prepare.video_limits
            per_view = len(profile.prompt_form(self.config.vision.temporal_patch_size).stamps)
        return tokenized_inputs(observation, views, self.config, statistics, prepare.tokenizer, limits, per_view)

    def _alone(self, call: Inference) -> ActionChunk:
        if isinstance(call.observation, Observation):
            return self.infer(call.observation, call.prefix, call.noise, call.seed, call.guide)
        return self.infer_tokenized(call.observation, call.prefix, call.noise, call.seed, call.guide)

    def _launched(self, call: Inference) -> Underway:
        assert isinstance(self.model, FusedModel)
        assert self.model.lookahead is not None
        # Nothing is waited for: its marks are the host's.
        clock, observation = StageClock(), call.observation
        with self.model.lookahead.beside():
            if isinstance(observation, Observation):
                inputs = self._preprocess([observation], self.model.patch_buffer)
            else:
                inputs = self._tokenized(observation)
        given = self._take(inputs, Asked([observation], [call.prefix], call.noise, call.seed, [None]))
        clock.mark("preprocess")
        return Underway(clock, given, self.model.launch(inputs, given.noise, given.prefix, given.prefix_length))

    def _landed(self, underway: Underway) -> ActionChunk:
        sampled = underway.launched.chunk()
        underway.clock.mark("step")
        return self._chunks(underway.clock, underway.given, sampled)[0]

    def _run(self, clock: StageClock, inputs: ModelInputs, asked: Asked) -> list[ActionChunk]:
        given = self._take(inputs, asked)
        clock.mark("preprocess")
        if given.guides is None:
            chunk = self.model.step(inputs, given.noise, given.prefix, given.prefix_length, clock.mark)
        else:
            guidance = Guidance.of(given.guides.target, given.guides.length, given.guides.frozen)
            chunk = reference_of(self.model, "guide").step_guided(self.model, inputs, given.noise, guidance, clock.mark)
        return self._chunks(clock, given, chunk.cpu())

    def _take(self, inputs: ModelInputs, asked: Asked) -> Given:
        self._check_process()
        robot_types = [self._preprocess.resolve(observation.robot_type)[0] for observation in asked.observations]
        given = take(asked, robot_types, tuple(inputs.action_mask.shape), self.statistics)
        if given.guides is not None:
            reference_of(self.model, "guide")
        return given

    def _chunks(self, clock: StageClock, given: Given, chunk: Tensor) -> list[ActionChunk]:
        # A copy: the network's next call may overwrite its chunk.
        decoded = chunks(chunk.numpy().copy(), given, self.statistics, self.plausible_std)
        clock.mark("decode")
        bends, timing = bends_of(self.model, len(decoded)), clock.finish()
        return [replace(each, timing_ms=timing, bend=bend) for each, bend in zip(decoded, bends, strict=True)]
