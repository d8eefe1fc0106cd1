"""Completion in bash of ``mtr-lab …`` and ``python -m mtr_lab…``; Hydra's own does not know a command or a module."""

import os
import re
import sys

BASH = """\
_mtr_lab_else=$(complete -p python 2> /dev/null | sed -n 's/.*-F \\([^ ]*\\).*/\\1/p')
_mtr_lab() {
  local program=("${COMP_WORDS[@]:0:3}")
  if [[ ${COMP_WORDS[0]} == *mtr-lab ]]; then
    program=("${COMP_WORDS[0]}")
  elif [[ ${COMP_WORDS[1]} != -m || ${COMP_WORDS[2]} != mtr_lab* ]]; then
    [[ -z $_mtr_lab_else || $_mtr_lab_else == _mtr_lab ]] || "$_mtr_lab_else" "$@"
    return
  fi
  compopt -o nospace
  local choices=$(COMP_LINE=$COMP_LINE "${program[@]}" -sc query=bash 2> /dev/null)
  COMPREPLY=($(compgen -W "$choices" -- "${COMP_WORDS[COMP_CWORD]}"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o default -F _mtr_lab python python3 mtr-lab"""


def answer_completion() -> bool:
    """Answer ``-sc install=bash``; prepare a query of the script that it installs for Hydra, which answers it.

    Returns:
        whether nothing is left to do.
    """
    if "-sc" in sys.argv:
        os.environ.setdefault("COMP_LINE", "python -m mtr_lab ")
        os.environ["COMP_LINE"] = line = re.sub(r"^\s*\S*python\S*\s+-m\s+", "", os.environ["COMP_LINE"])
        if folder := re.search(r"\s(?:--config-dir|-cd)[\s=]\s*(\S+)\s", line):
            sys.argv += ["--config-dir", os.path.expanduser(folder[1])]
    if sys.argv[1:] == ["-sc", "install=bash"]:
        print(BASH)
        return True
    return False
