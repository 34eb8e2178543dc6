# Read by the scripts of this folder that train on other machines: checks of the arguments before anything is created.

fail() { echo "${0##*/}: $1 (see --help)" >&2 && exit 2; }

value() { # FLAG VALUE: sets the variable of that name
  if [[ $2 ]]; then printf -v "${1#--}" %s "$2"; else fail "$1 has no value"; fi
}

value_of() { # FLAG ARGS...: the last value of FLAG among ARGS, written as `FLAG VALUE` or `FLAG=VALUE`; empty without
  local flag=$1 found='' last=''
  for word in "${@:2}"; do
    if [[ $last == "$flag" ]]; then found=$word; fi
    if [[ $word == "$flag="* ]]; then found=${word#*=}; fi
    last=$word
  done
  echo "$found"
}

need_bucket() { # FLAG ARGS...: what is written anywhere else is lost with the machine
  local place
  place=$(value_of "$@")
  [[ $place ]] || fail "$1 is missing among ARGS: give $1 bucket/SOME/PLACE, since only the bucket is kept"
  [[ $place == bucket/?* && /$place/ != */../* ]] || fail "$1 $place is not in the bucket: give $1 bucket/SOME/PLACE"
}

need_config() { # CHECKOUT ARGS...: the config is in CHECKOUT/configs, which is copied to the machines, or in the bucket
  local file inside
  file=$(value_of --config "${@:2}") && file=${file%%.py:*}
  [[ $file ]] || fail "--config is missing among ARGS: give a config file"
  file=${file%.py}.py inside=${file#configs/}
  [[ $file == bucket/?* || ($inside =~ ^(paper/)?[^/]+$ && -f $1/configs/$inside) ]] ||
    fail "config $file does not exist on the machines: put it into $1/configs, which is copied there, or in bucket/"
}
