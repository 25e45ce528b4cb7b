//! Reference embedding. Tests compare the vocabulary-parallel embedding with this function.

use ndarray::{Array2, Axis};

/// `y[t, :] = table[ids[t], :]`.
///
/// `ids: [tokens]`, `table: [rows, features]`, `y: [tokens, features]`.
///
/// # Panics
/// When an id is not below `rows`.
pub fn embedding(ids: &[usize], table: &Array2<f64>) -> Array2<f64> {
    check_ids("embedding", ids, table.nrows());
    table.select(Axis(0), ids)
}

/// `dtable[r, :] = Σ dy[t, :]` over the tokens `t` with `ids[t] = r`, and 0 without such tokens:
/// the gradient of [`embedding`].
///
/// `ids: [tokens]`, `dy: [tokens, features]`, `dtable: [rows, features]`.
///
/// # Panics
/// When an id is not below `rows`, or `ids` and `dy` differ in `tokens`.
pub fn embedding_backward(ids: &[usize], rows: usize, dy: &Array2<f64>) -> Array2<f64> {
    check_ids("embedding_backward", ids, rows);
    assert_eq!(ids.len(), dy.nrows(), "embedding_backward: the tokens of ids and of dy");
    let mut dtable = Array2::zeros((rows, dy.ncols()));
    for (&id, dy) in ids.iter().zip(dy.rows()) {
        let mut row = dtable.row_mut(id);
        row += &dy;
    }
    dtable
}

fn check_ids(name: &str, ids: &[usize], rows: usize) {
    for &id in ids {
        assert!(id < rows, "{name}: id {id} is beyond a table of {rows} rows");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::testing::{check_gradient, loss, random};
    use ndarray::array;

    #[test]
    fn literals() {
        let table = array![[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]];
        assert_eq!(embedding(&[2, 0, 2], &table), array![[5.0, 6.0], [1.0, 2.0], [5.0, 6.0]]);
        let dy = array![[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]];
        assert_eq!(embedding_backward(&[2, 0, 2], 3, &dy), array![[2.0, 20.0], [0.0, 0.0], [5.0, 50.0]]);
    }

    #[test]
    fn gradients() {
        let (ids, table, dy) = ([3, 1, 3, 0], random((5, 2), 1), random((4, 2), 2));
        let dtable = embedding_backward(&ids, 5, &dy);
        check_gradient("dtable", &table, &dtable, |table| loss(embedding(&ids, table), &dy));
    }

    #[test]
    fn no_tokens() {
        assert_eq!(embedding(&[], &Array2::ones((3, 2))).dim(), (0, 2));
        assert_eq!(embedding_backward(&[], 3, &Array2::zeros((0, 2))), Array2::<f64>::zeros((3, 2)));
    }

    #[test]
    #[should_panic(expected = "embedding: id 3 is beyond a table of 3 rows")]
    fn an_id_beyond_the_table_panics() {
        embedding(&[3], &Array2::zeros((3, 2)));
    }
}
