def test_fixtures(tiny_lm, tiny_images, tiny_vectors, lm_files, image_folder):
    from unlearn.checkpoint import inspect, Options
    print(inspect(tiny_lm), inspect(tiny_images[0]), inspect(tiny_vectors, Options(model="tests.plain:factory")))
