

def test_a_network_of_many_layers(engine: Engine) -> None:
    engine.probe()
    onnx = unet()
    session, wanted = engine.load(onnx), OnnxRuntimeCpu().load(onnx)
    for shape in ((4, 1, 16, 24), (2, 1, 32, 32)):
        batch = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        found = session.run({"x": batch})["p"]
        np.testing.assert_allclose(found.sum(axis=1), 1.0, rtol=1e-5)
        np.testing.assert_allclose(found, wanted.run({"x": batch})["p"], rtol=1e-3, atol=1e-4)
    session.close()
