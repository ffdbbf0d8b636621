//! What PostgreSQL is started with: program, settings, environment, what it inherits.

use pgtypes::Incarnation;

use super::{Agent, AttemptError, Prepared, random};
use crate::{
    area::SharedArea,
    config::SafekeeperConfig,
    postgres::{Launch, LogTarget},
    restore::{self, RestoreError},
    session::ElectedEvent,
    settings::{self, ConninfoTls, Replay, Start},
    shared_memory,
};

impl Agent {
    pub(super) fn launch(
        &self,
        elected: &ElectedEvent,
        prepared: &Prepared,
        area: &SharedArea,
    ) -> Result<Launch, AttemptError> {
        let config = &self.settings.config;
        let user = self.settings.user.as_ref();
        let pgdata = self.data_dir.pgdata();
        let socket_dir = config.socket_dir();
        restore::make_directory_for(&socket_dir, 0o755, user)?;
        restore::remove_stale_socket(&socket_dir, config.postgres.port, &pgdata)?;
        let ballot = elected.ballot;
        let trust = format!("{}/{}/{}/{}", config.cluster, ballot.term.0, ballot.attempt.0, Incarnation(random()?));
        restore::write_for(&pgdata.join(vfs_abi::TRUST_FILE), format!("{trust}\n").as_bytes(), user)?;

        let conninfo = self.primary_conninfo(elected)?;
        let last_record = prepared.replay_to.map(|last_record| last_record.to_string());
        let start = Start {
            listen_addresses: &config.postgres.listen_addresses,
            port: config.postgres.port,
            socket_dir: &socket_dir.to_string_lossy(),
            dynamic_shared_memory_type: shared_memory::dynamic_type(self.settings.isolation),
            hints_need_wal: prepared.hints_need_wal,
            replay: last_record.as_deref().map(|last_record| Replay { primary_conninfo: &conninfo, last_record }),
        };
        let mut inherited = area.inherited().to_vec();
        inherited.extend(prepared.cache.iter().flat_map(|(blocks, _)| blocks.inherited()));
        let preload = match std::env::var("LD_PRELOAD") {
            Ok(others) if !others.is_empty() => format!("{}:{others}", config.postgres.vfs_library.display()),
            _ => config.postgres.vfs_library.display().to_string(),
        };
        let mut environment = vec![
            ("LD_PRELOAD".to_owned(), preload),
            (vfs_abi::ENV_PGDATA.to_owned(), pgdata.display().to_string()),
            (vfs_abi::ENV_TRUST.to_owned(), trust),
        ];
        environment.extend(inherited.iter().map(|(name, fd)| ((*name).to_owned(), fd.to_string())));
        Ok(Launch {
            helper: self.settings.helper.clone(),
            isolation: self.settings.isolation,
            user: self.settings.user.clone(),
            program: config.postgres.bin_dir.join("postgres"),
            pgdata,
            arguments: settings::arguments(&config.postgres.parameters, &start),
            environment,
            inherited: inherited.iter().map(|(_, fd)| *fd).collect(),
            log: LogTarget::new(config.postgres.log, self.data_dir.postgres_log()),
        })
    }

    /// The safekeepers, those first that are known to hold the whole log.
    pub(super) fn holders_first(&self, elected: &ElectedEvent) -> impl Iterator<Item = &SafekeeperConfig> {
        let (holders, others): (Vec<_>, Vec<_>) =
            self.settings.config.safekeepers.iter().partition(|known| elected.holders.contains(&known.member));
        holders.into_iter().chain(others)
    }

    /// Connection string to the safekeepers, those first that are known to hold the whole log.
    fn primary_conninfo(&self, elected: &ElectedEvent) -> Result<String, AttemptError> {
        let config = &self.settings.config;
        let hosts: Vec<(&str, u16)> = self
            .holders_first(elected)
            .map(|safekeeper| (safekeeper.replication.host.as_str(), safekeeper.replication.port))
            .collect();
        let writer = config.writer.to_string();
        let Some((ca, certificate, key)) =
            config.tls.files().filter(|_| config.tls.mode == crate::config::TlsMode::Required)
        else {
            return Ok(settings::primary_conninfo(&hosts, config.log_id(), &writer, None));
        };
        // PostgreSQL's user may not read the agent's key, and libpq wants it to be that user's own.
        let user = self.settings.user.as_ref();
        let directory = self.data_dir.postgres_tls();
        restore::make_directory_for(&directory, 0o700, user)?;
        let mut copies = Vec::new();
        for (name, source) in [("ca.pem", ca), ("certificate.pem", certificate), ("key.pem", key)] {
            let contents = std::fs::read(source)
                .map_err(|source_error| RestoreError::Io { path: source.to_owned(), source: source_error })?;
            let copy = directory.join(name);
            restore::write_for(&copy, &contents, user)?;
            copies.push(copy.display().to_string());
        }
        let tls = ConninfoTls { ca: &copies[0], certificate: &copies[1], key: &copies[2] };
        Ok(settings::primary_conninfo(&hosts, config.log_id(), &writer, Some(tls)))
    }
}
