def test_a(stored):
    print(stored.record.keys(), stored.folder)
