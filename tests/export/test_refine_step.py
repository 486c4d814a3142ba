"""The exported graphs: a step and a map against the reference in float64, and who builds them."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from cases import case
from exactness import relative_error, wide
from refinements import (
    CASES,
    GATE,
    GATE_GUIDES,
    GUIDE,
    PICTURES,
    SEG,
    SIZE,
    assert_share,
    case_name,
    draw,
    make,
    torch_update,
)

from runtime import RefineOptions
from runtime.core import parameters, reference
from runtime.engines.onnx import OnnxEngine
from runtime.errors import InputError

onnx = pytest.importorskip("onnx", reason="needs onnx, which writes the graphs")

from export.refine_step import build_map, build_step  # noqa: E402 (after importorskip)

RESIDUAL_BOUND = 5e-6  # of the update: no kinks but those of ReLU; thin pictures reach 2e-6


def engine_of(model):
    return OnnxEngine(model.SerializeToString(), threads=1)


def run(model, feed):
    """Outputs of the model by name; ``feed`` may hold more than the graph takes."""
    return outputs(engine_of(model), feed)


def outputs(engine, feed):
    """Outputs of the engine by name; ``feed`` may hold more than the graph takes."""
    arrays = [feed[p.name] for p in engine.inputs]
    return dict(zip([p.name for p in engine.outputs], engine(*arrays), strict=True))


def planar(array):
    return np.ascontiguousarray(array.transpose(2, 0, 1)[None], np.float32)


def inputs(options, state, image, guide, classes=5):
    """What the step takes, and the class table that it should find."""
    o = RefineOptions(**options)
    clusters = len(state["conv3.weight"])
    weights, momenta, buffers, _ = parameters.flatten(o, clusters, state)
    soft = np.zeros((*image.shape[:2], classes), np.float32)
    rank, table = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    if guide is not None:
        soft = np.eye(classes + 1, classes, dtype=np.float32)[guide] if guide.ndim == 2 else guide
        present = np.arange(classes) if guide.ndim == 3 else np.unique(guide[guide >= 0])
        rank[present] = np.arange(len(present))
    if guide is not None and o.objective == "dynaguide":
        x = reference.prepare(o, wide(image), guide)["x"]
        wide_state = {k: wide(v) for k, v in state.items()}
        labels = reference.forward(o, wide_state, x, None, False)[0].argmax(-1)
        count = guide.shape[2] if guide.ndim == 3 else guide.max() + 1
        table[:count] = reference.overlap_mapping(guide, labels, count, clusters)
    return {
        "image": planar(image),
        "guide": planar(soft),
        "assign": rank if o.mapping == "index_modulo" else table,
        "parameters": weights,
        "momenta": momenta,
        "buffers": buffers,
    }


def assert_step_matches(image, guide, options, **sizes):
    """One step and the map after it, from a state that is not fresh."""
    refiner = make(image, options)
    refiner.run(image, guide, steps=1)  # so that momenta and buffers are in use
    start, o = refiner.state_dict(), refiner.options
    feed = inputs(options, start, image, guide)
    out = run(build_step(o, **sizes), feed)
    scores, _, rows, counts, _, after = reference.run(o, start, wide(image), guide, steps=1)
    weights, momenta, buffers, _ = parameters.flatten(o, refiner.classes, after)
    bound = RESIDUAL_BOUND if o.objective == "residual" else GATE
    assert relative_error(out["momenta_out"], momenta) <= bound
    update = out["parameters_out"].astype(np.float64) - feed["parameters"]
    exact = weights.astype(np.float64) - feed["parameters"]
    assert relative_error(update, exact) <= bound
    assert relative_error(out["buffers_out"], buffers) <= 1e-6
    np.testing.assert_allclose(out["losses"], rows[0], rtol=1e-5, atol=2e-6)
    assert ("clusters" in out) == (o.objective != "residual")  # residual has no stop rule here
    if "clusters" in out:
        assert out["clusters"] == counts[0]
    feed |= {k.removesuffix("_out"): v for k, v in out.items()}
    final = run(build_map(o, **sizes), feed)
    np.testing.assert_allclose(final["scores"][0].transpose(1, 2, 0), scores, atol=1e-4)
    assert (final["labels"][0] == final["scores"][0].argmax(0)).all()
    assert final["labels"].dtype == np.int32


def test_step():
    for options, kind in CASES:
        with case(case_name(options), kind):
            assert_step_matches(*draw(kind), options)


def test_step_on_thin_pictures():
    for shape in [(1, 1), (1, 7), (7, 1), (2, 2), (3, 61)]:
        for options, kind in [({}, "soft"), (GUIDE, "hard"), (SEG | {"diagonals": True}, "none")]:
            with case(shape, case_name(options)):
                assert_step_matches(*draw(kind, *shape), options)


def test_step_of_fixed_size():
    for options, kind in [({}, "soft"), (GUIDE, "hard"), (SEG, "none")]:
        with case(case_name(options)):
            assert_step_matches(*draw(kind), options, classes=5, height=13, width=17)
            assert_step_matches(*draw(kind, 1, 7), options, classes=5, height=1, width=7)
            assert_step_matches(*draw(kind), options, height=13)  # the width stays free


# Of the pictures 0 to 49, the share on which the error of one step's update is at most GATE, and
# the least share that the test allows: three binomial standard errors of 50 pictures less. A
# measured share of 1 has no standard error, so there all 50 must pass.
GATE_SHARES = {  # objective and blocks: (measured share, bound)
    ("residual", 2): (1.00, 1.000),
    ("residual", 3): (1.00, 1.000),
    ("dynaguide", 2): (0.98, 0.921),
    ("dynaguide", 3): (0.98, 0.921),
    ("dynaseg", 2): (0.90, 0.773),
    ("dynaseg", 3): (0.90, 0.773),
}


def step_error(engine, options, seed, size=SIZE):
    """Return the error of one step's update, relative to that of PyTorch in float64."""
    objective, blocks = options["objective"], options["blocks"]
    image, guide = draw(GATE_GUIDES[objective], *size, seed=seed)
    refiner = make(image, options)
    o = refiner.options
    feed = inputs(options, refiner.state_dict(), image, guide)
    out = outputs(engine, feed)
    update = out["parameters_out"].astype(np.float64) - feed["parameters"]
    rest = np.zeros(len(feed["parameters"])), feed["buffers"]
    named = parameters.unflatten(o, refiner.classes, update, *rest, 0)
    names = sorted(parameters.shapes(o, refiner.classes)[0])  # the order of torch_update
    ours = np.concatenate([named[name].ravel() for name in names])
    return relative_error(ours, torch_update(objective, blocks, seed, size))


def test_gate():
    for objective, blocks in GATE_SHARES:
        with case(objective, blocks):
            options = {"objective": objective, "blocks": blocks}
            engine = engine_of(build_step(RefineOptions(**options)))
            fulfilled = [step_error(engine, options, seed) <= GATE for seed in PICTURES]
            assert_share(fulfilled, GATE_SHARES[objective, blocks])


def test_step_of_a_larger_picture():
    for objective, blocks in GATE_SHARES:
        with case(objective, blocks):
            # Some of the millions of activations always lie at a kink, and each one on the wrong
            # side costs 1e-5 to 2e-4 of the update.
            options = {"objective": objective, "blocks": blocks}
            engine = engine_of(build_step(RefineOptions(**options)))
            assert step_error(engine, options, 0, (120, 160)) <= 1e-3


def test_overlap_is_the_shared_area():
    for kind in ["hard", "soft"]:
        with case(kind):
            options = GUIDE | {"soft_guide": kind == "soft"}
            image, guide = draw(kind)
            refiner = make(image, options)
            feed = inputs(options, refiner.state_dict(), image, guide)
            out = run(build_step(RefineOptions(**options, early_stop=0.9)), feed)
            assert out["labels"].shape == (1, 13, 17) and out["labels"].dtype == np.int32
            own = np.eye(7)[out["labels"][0]]
            area = np.einsum("chw,hwk->ck", feed["guide"][0].astype(np.float64), own)
            np.testing.assert_allclose(out["overlap"], area, rtol=0 if kind == "hard" else 1e-5)
            assert out["clusters"] == own.any((0, 1)).sum()


def test_residual_counts_labels_where_a_stop_rule_needs_them():
    image, guide = draw("soft")
    guide[..., 2] = 0
    state = parameters.initial_state(RefineOptions(), 5)
    feed = inputs({}, state, image, guide)
    plain = run(build_step(RefineOptions()), feed)
    assert "clusters" not in plain and "labels" not in plain
    out = run(build_step(RefineOptions(early_stop=0.9)), feed)
    np.testing.assert_array_equal(out["labels"][0], guide.argmax(-1))  # no step yet: the prior
    assert out["clusters"] == len(np.unique(guide.argmax(-1)))
    for options in ({"min_labels": 2}, {"silhouette": True}):
        assert "labels" not in (more := run(build_step(RefineOptions(**options)), feed))
        assert more["clusters"] == out["clusters"]
    np.testing.assert_array_equal(out["parameters_out"], plain["parameters_out"])


def test_classes_that_the_guide_has_nowhere_take_no_part():
    image, guide = draw("soft")
    wider = np.zeros((*guide.shape[:2], 8), np.float32)
    wider[..., :5] = guide
    o = RefineOptions()
    refiner = make(image, {})
    refiner.run(image, guide, steps=2)
    state = refiner.state_dict()
    padded = {  # other values than 0: they must not matter
        k: np.concatenate([v, np.full((3, *v.shape[1:]), 0.3, np.float32)]) if "conv3" in k else v
        for k, v in state.items()
    }
    feeds = inputs({}, state, image, guide), inputs({}, padded, image, wider, 8)
    few, many = (run(build_step(o), feed) for feed in feeds)
    np.testing.assert_allclose(many["losses"], few["losses"], rtol=1e-6)
    few, many = (
        parameters.unflatten(o, k, out["parameters_out"], out["momenta_out"], out["buffers_out"], 3)
        for k, out in ((5, few), (8, many))
    )
    for name, value in few.items():
        rows = many[name][:5] if "conv3" in name else many[name]
        np.testing.assert_allclose(rows, value, rtol=1e-4, atol=1e-6, err_msg=name)
    for name in ("momentum.conv3.weight", "momentum.conv3.bias"):  # no gradient: only decay
        np.testing.assert_allclose(many[name][5:], 0.9 * 0.3, rtol=1e-6)
    final = run(build_map(o), feeds[1])
    assert (final["scores"][0, 5:] == 0).all() and final["labels"].max() < 5
    np.testing.assert_allclose(final["scores"][0].sum(0), 1, rtol=1e-5)


def test_baked_map_uses_running_statistics():
    for options, kind in [({}, "soft"), (GUIDE, "hard"), (SEG | {"final_bn": "none"}, "none")]:
        with case(case_name(options)):
            image, guide = draw(kind)
            refiner = make(image, options)
            refiner.run(image, guide, steps=3)
            o, state = refiner.options, refiner.state_dict()
            model = build_map(o, state=state)
            taken = {"image", "guide"} if o.objective == "residual" else {"image"}
            assert {i.name for i in model.graph.input} == taken
            out = run(model, inputs(options, state, image, guide))
            fixed = reference.prepare(o, wide(image), guide)
            wide_state = {k: wide(v) for k, v in state.items()}
            r, _ = reference.forward(o, wide_state, fixed["x"], fixed["prior"], True)
            np.testing.assert_allclose(
                out["scores"][0].transpose(1, 2, 0), reference.softmax(r)[0], atol=1e-5
            )


# --- the files ---------------------------------------------------------------------------------


def test_graph_is_standard_and_says_what_it_is():
    for options, kind in CASES:
        with case(case_name(options), kind):
            o = RefineOptions(**options)
            for model in (
                build_step(o),
                build_step(o, classes=5, height=13, width=17),
                build_map(o),
            ):
                onnx.checker.check_model(model, full_check=True)
                assert [(i.domain, i.version) for i in model.opset_import] == [("", 18)]
                assert model.ir_version in (9, 10)
                kinds = {node.op_type for node in model.graph.node}
                assert not kinds & {
                    "Unique",
                    "NonZero",
                    "ScatterND",
                    "ScatterElements",
                    "Loop",
                    "If",
                }
                metadata = {p.key: p.value for p in model.metadata_props}
                assert metadata["dg.objective"] == o.objective
                assert json.loads(metadata["dg.options"]) == json.loads(json.dumps(asdict(o)))
                assert {"description", "author", "version"} <= metadata.keys()
                names = [c.name for c in model.graph.initializer]
                used = {i for node in model.graph.node for i in node.input}
                assert len(set(names)) == len(names) and set(names) <= used
                assert len(model.SerializeToString()) < 60_000  # weights are inputs


def ports(values):
    def dims(value):
        return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    return {v.name: dims(v) for v in values}


def test_names_and_shapes():
    free, o = build_step(RefineOptions()), RefineOptions(channels=4)
    assert ports(free.graph.input) == {
        "image": [1, 3, "height", "width"],
        "guide": [1, "classes", "height", "width"],
        "parameters": ["parameters"],
        "momenta": ["parameters"],
        "buffers": [128],
    }
    fixed = build_step(o, classes=6, height=9, width=11)
    count = sum(int(np.prod(s)) for s in parameters.shapes(o, 6)[0].values())
    assert ports(fixed.graph.output) == {
        "parameters_out": [count],
        "momenta_out": [count],
        "buffers_out": [16],
        "losses": [4],
    }
    guide = build_step(RefineOptions(**GUIDE, early_stop=0.9), classes=6, height=9, width=11)
    assert ports(guide.graph.input)["assign"] == [6]
    assert {"clusters": [1], "labels": [1, 9, 11], "overlap": [6, 7]}.items() <= ports(
        guide.graph.output
    ).items()
    assert ports(build_map(RefineOptions()).graph.output) == {
        "scores": [1, "classes", "height", "width"],
        "labels": [1, "height", "width"],
    }
    running = build_map(RefineOptions(**GUIDE, final_bn="running"), height=9, width=11)
    assert list(ports(running.graph.input)) == ["image", "parameters", "buffers"]
    assert "guide" not in ports(build_step(RefineOptions(**SEG)).graph.input)


def test_the_same_options_give_the_same_bytes():
    first, again = (build_step(RefineOptions()).SerializeToString() for _ in range(2))
    assert first == again


def test_refuses():
    o = RefineOptions()
    for sizes, message in (
        ({"classes": 0}, "classes is 0; wanted 1 to 4096"),
        ({"height": 0}, "height is 0; wanted 1 to"),
        ({"width": 1.5}, "width is 1.5; wanted a whole number"),
    ):
        for build in (build_step, build_map):
            with pytest.raises(InputError, match=message):
                build(o, **sizes)
    state = parameters.initial_state(o, 5)
    with pytest.raises(InputError, match="classes is 6, but the state has 5"):
        build_map(o, classes=6, state=state)
    with pytest.raises(InputError, match=r"state has no 'conv2\.1\.weight'"):
        build_map(RefineOptions(blocks=3), state=state)


# --- TensorRT for RTX builds without a GPU ------------------------------------------------------


def build_engine(model, shapes):
    trt = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX, the builder")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    definition = builder.create_network(typed)
    parser = trt.OnnxParser(definition, logger)
    parsed = parser.parse(model.SerializeToString())
    assert parsed, [str(parser.get_error(i)) for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    if shapes:
        profile = builder.create_optimization_profile()
        for value in model.graph.input:
            if value.name in shapes:
                profile.set_shape(value.name, *shapes[value.name])
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(definition, config)
    assert plan is not None and plan.nbytes > 100_000


RTX = [
    {},
    {"early_stop": 0.99, "min_labels": 2},
    {"objective": "dynaguide"},
    {"objective": "dynaguide", "mapping": "index_modulo", "final_bn": "running", "blocks": 3},
    {"objective": "dynaseg", "weighting": "scf"},
]


def test_tensorrt_rtx_builds_it():
    for free in [False, True]:
        for options in RTX:
            with case(case_name(options), free):
                o = RefineOptions(**options)
                if not free:
                    build_engine(build_step(o, classes=14, height=48, width=64), {})
                    build_engine(build_map(o, classes=14, height=48, width=64), {})
                    return
                sizes = (2, 32, 32), (8, 120, 160), (20, 480, 640)  # smallest, usual, largest
                shapes = {
                    "image": [(1, 3, h, w) for _, h, w in sizes],
                    "guide": [(1, k, h, w) for k, h, w in sizes],
                    "assign": [(k,) for k, _, _ in sizes],
                }
                if o.objective == "residual":
                    flat = [
                        sum(int(np.prod(s)) for s in parameters.shapes(o, k)[0].values())
                        for k, _, _ in sizes
                    ]
                    shapes |= {name: [(n,) for n in flat] for name in ("parameters", "momenta")}
                build_engine(build_step(o), shapes)
                build_engine(build_map(o), shapes)
                if not options:  # weights baked in
                    build_engine(
                        build_map(o, state=parameters.initial_state(o, 8), height=48, width=64), {}
                    )
