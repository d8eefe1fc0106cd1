"""Completion in bash of ``python -m mtr_lab …``; Hydra's own serves installed commands (``mtr-lab``) and files."""

import os
import re
import sys

BASH = """\
_mtr_lab_else=$(complete -p python 2> /dev/null | sed -n 's/.*-F \\([^ ]*\\).*/\\1/p')
_mtr_lab() {
  if [[ ${COMP_WORDS[1]} != -m || ${COMP_WORDS[2]} != mtr_lab* ]]; then
    [[ -z $_mtr_lab_else || $_mtr_lab_else == _mtr_lab ]] || "$_mtr_lab_else" "$@"
    return
  fi
  compopt -o nospace
  local choices=$(COMP_LINE=$COMP_LINE "${COMP_WORDS[@]:0:3}" -sc query=bash 2> /dev/null)
  COMPREPLY=($(compgen -W "$choices" -- "${COMP_WORDS[COMP_CWORD]}"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o default -F _mtr_lab python python3"""


def answer_completion() -> bool:
    """Answer ``-sc install=bash`` of ``python -m mtr_lab``, if that was asked, and let Hydra understand a query of it.

    Returns:
        Whether it was asked, and nothing is left to do.
    """
    if "-sc" in sys.argv:
        os.environ.setdefault("COMP_LINE", "python -m mtr_lab ")
        os.environ["COMP_LINE"] = line = re.sub(r"^\s*\S*python\S*\s+-m\s+", "", os.environ["COMP_LINE"])
        if folder := re.search(r"\s(?:--config-dir|-cd)[\s=]\s*(\S+)\s", line):
            sys.argv += ["--config-dir", os.path.expanduser(folder[1])]
    as_module = sys.argv[0].endswith(".py")
    if as_module and sys.argv[1:] == ["-sc", "install=bash"]:
        print(BASH)
        return True
    return False
