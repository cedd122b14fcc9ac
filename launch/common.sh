# What the scripts beside this file share; they source it.

step() {
    printf '\n\033[1m== %s\033[0m\n' "$1"
}

run() {
    printf '$ %s\n' "$*"
    "$@"
}

# DIR: all the Python sources that come with Python, its tests included, in DIR/text; their tokenizer beside it
stdlib_text() {
    local stdlib
    stdlib=$(python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')
    rm -rf "$1"/text "$1"/tokenizer.*
    mkdir -p "$1"/text
    (cd "$stdlib" && find . -name '*-packages' -prune -o -name '*.py' -print0 | tar c --null -T -) | tar x -C "$1"/text
    run tools/train_tokenizer.py "$1"/text --vocab-size "${VOCAB:-4096}" --sample-bytes 3000000 --out "$1"/tokenizer.model
}
