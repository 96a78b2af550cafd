//! AdaLoRA's map: the triplets that are left, layers by modules.

/// A module's path, and its rank.
pub type Rank = (String, usize);

/// Ranks in rows of layers and columns of modules, both in the order of the model; a module that a layer lacks has none.
#[derive(Debug, PartialEq)]
pub struct RankMap {
    /// The layers' numbers, or the paths of modules that are in none.
    pub layers: Vec<String>,
    /// The modules' names.
    pub modules: Vec<String>,
    /// By layer and module.
    pub ranks: Vec<Vec<Option<usize>>>,
}

impl RankMap {
    /// Of modules by path: `model.layers.3.self_attn.q_proj` is in row 3, column `q_proj`.
    pub fn of(ranks: &[Rank]) -> Self {
        let mut map = Self { layers: Vec::new(), modules: Vec::new(), ranks: Vec::new() };
        for (path, rank) in ranks {
            let layer = path.split('.').find(|part| part.parse::<usize>().is_ok()).unwrap_or("-");
            let module = path.rsplit('.').next().unwrap_or(path);
            let (row, column) = (place(&mut map.layers, layer), place(&mut map.modules, module));
            map.ranks.resize(map.layers.len(), Vec::new());
            map.ranks.iter_mut().for_each(|row| row.resize(map.modules.len(), None));
            map.ranks[row][column] = Some(*rank);
        }
        map
    }

    /// As text, a line a layer.
    pub fn lines(&self) -> Vec<String> {
        let width = |name: &String| name.len().max(3);
        let label = self.layers.iter().map(String::len).max().unwrap_or(0).max("layer".len());
        let head: String = self.modules.iter().map(|name| format!("  {name:>0$}", width(name))).collect();
        let row = |(layer, ranks): (&String, &Vec<Option<usize>>)| {
            let cell = |(name, rank): (&String, &Option<usize>)| {
                let rank = rank.map_or_else(String::new, |rank| rank.to_string());
                format!("  {rank:>0$}", width(name))
            };
            format!("{layer:>label$}{}", self.modules.iter().zip(ranks).map(cell).collect::<String>())
        };
        let rows = self.layers.iter().zip(&self.ranks).map(row);
        [format!("{:>label$}{head}", "layer")].into_iter().chain(rows).map(|line| line.trim_end().into()).collect()
    }
}

/// The place of a name in a list, which gets it where it lacks it.
fn place(names: &mut Vec<String>, name: &str) -> usize {
    names.iter().position(|known| known == name).unwrap_or_else(|| {
        names.push(name.into());
        names.len() - 1
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_rows_and_modules_columns() {
        let ranks = [
            ("model.layers.0.self_attn.q_proj", 3),
            ("model.layers.0.mlp.up_proj", 0),
            ("model.layers.11.mlp.up_proj", 12),
        ];
        let map = RankMap::of(&ranks.map(|(path, rank)| (path.to_string(), rank)));
        assert_eq!(map.lines(), ["layer  q_proj  up_proj", "    0       3        0", "   11               12"]);
    }
}
