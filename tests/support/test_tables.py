"""CSV files as people have them are read alike, and what may be read in two ways is refused."""

import numpy as np
import pytest

from scaling_perception.support.errors import UserError
from scaling_perception.support.tables import read_table

PLAIN = "a,b\n1.5,2\n3,4.25\n"


@pytest.mark.parametrize(
    "data",
    [
        PLAIN.encode(),
        PLAIN.encode("utf-8-sig"),
        PLAIN.encode("utf-16"),
        PLAIN.encode("utf-16-le"),
        PLAIN.encode("utf-16-be"),
        PLAIN.replace("\n", "\r\n").encode(),
        PLAIN.replace(",", ";").replace(".", ",").encode(),
        PLAIN.replace(",", "\t").encode(),
        PLAIN.replace(",", "|").encode(),
        ("sep=;\r\n" + PLAIN.replace(",", ";")).encode(),
        ("# made by hand\n\n" + PLAIN + "\n\n").encode(),
        b"a,b,\n1.5,2,\n3,4.25,\n",
        b'"a", "b"\n"1,5","2"\n"3","4,25"\n',
        b"a,b\n 1.5 , 2 \n3.0,4.25,,\n",
    ],
)
def test_the_same_numbers_however_they_are_written(tmp_path, data):
    (tmp_path / "t.csv").write_bytes(data)
    table = read_table(tmp_path / "t.csv")
    assert table.names == ["a", "b"]
    np.testing.assert_array_equal(np.stack([table.numbers("a"), table.numbers("b")]), [[1.5, 3], [2, 4.25]])


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "is empty"),
        ("a,b\n", "has no rows"),
        ("a,a\n1,2\n", "names 'a' twice"),
        ("a,,b\n1,2,3\n", "column 2 of the first line has no name"),
        ("a,b\n1,2\n1,5,2\n", "line 3 has 3 fields where the first line names 2: a decimal comma"),
        ("a;b\n1;2\n3\n", "line 3 has 1 field where"),
        ("a;b\n1,234;2\n", "line 2: a '1,234' may be a decimal comma or a comma between thousands"),
        ("a;b\n1.5;2\n1,5;2\n", "line 3: a '1,5' has a comma where other values of the file have a point"),
        ("a;b\n1.234;2\n1.5;3,5\n", "line 3: b '3,5' has a comma where a has a point"),
        ("a,b\n12%,2\n", "line 2: a '12%' is no number"),
        ("a,b\n1_0,2\n", "line 2: a '1_0' is no number"),
        ('a,b\n"1\n2",3\n4,x\n', "line 2: a"),
        ('a,b\n"1,2\n', "is no CSV"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, text, words):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        read_table(tmp_path / "t.csv").numbers("a")
    assert "\n" not in str(error.value).replace("1\n2", "")


def test_missing_values_and_missing_columns(tmp_path):
    (tmp_path / "t.csv").write_text("macs,loss\n1,\nNA,2\nnull,nan\n")
    table = read_table(tmp_path / "t.csv")
    assert np.isnan(table.numbers("macs")).tolist() == [False, True, True]
    assert np.isnan(table.numbers("loss")).tolist() == [True, False, True]
    with pytest.raises(UserError, match="has no column 'mac'; did you mean 'macs'"):
        table.numbers("mac")
    with pytest.raises(UserError, match="does not exist"):
        read_table(tmp_path / "no.csv")
    (tmp_path / "b.csv").write_bytes(bytes(range(256)) * 20)
    with pytest.raises(UserError, match="no text file"):
        read_table(tmp_path / "b.csv")
