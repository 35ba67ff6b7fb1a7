"""What goes beyond the main job of dino_cache. Nothing here is imported before it is asked for by name.

    formats/          datasets other than GNM folders: recon, lerobot, video    dino_cache.FORMAT_MODULES
    ray_workers.py    executor: ray, the work on many GPUs and machines         dino_cache.EXECUTOR_MODULES
    openvino_engine.py  engine: openvino, another library on a CPU              dino_cache.ENGINE_MODULES
    commands/         verify, rebuild, export, report                           progress_utils.COMMAND_MODULES
    chunk_files.py    reading a chunk file, and checking it against its record
    cache_index.py    a record as a table of chunks
    frame_data.py     which datasets of a frame a reader gives
    labels.py         waypoints and goals of windows
    windows.py        CacheWindows, to train on                                 dino_cache.DOORS
    images.py         encode_images, features of a few pictures                 dino_cache.DOORS
    recut.py          --recut, tokens out of the chunks that are replaced         dino_cache.RECUT_MODULE
    measure.py        --dry-run --measure, the speed of decoding and encoding
    pose_facts.py     what poses add up to, and what looks like another unit or other axes

Imports run one way: dino_cache_extras -> dino_cache -> progress_utils -> the standard library.
"""
