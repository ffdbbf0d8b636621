//! Who is there, and which log does it want: TLS, startup packet, certificate or password.

use std::{path::PathBuf, sync::Arc, time::Duration};

use admin::Notices;
use driver::{Connection, Detached};
use identity::{Call, FollowerTls, NotAllowed, Tls, peer_of};
use pgtypes::LogId;
use wire::postgres::{
    ErrorReply, FrontendMessage, MessageReader, ProtocolError, Reply, Startup, StartupMessage, options_setting,
    scram::{self, ChannelBinding, ScramError, Verifier},
    sqlstate,
};

use super::{FollowerMetrics, SessionError, SlotLimits, inbound, users};

/// From the first byte to the login (PostgreSQL's `authentication_timeout`).
const LOGIN_LIMIT: Duration = Duration::from_secs(60);
/// Setting in the startup parameter `options` that names the log: `-c lakebase.log=<cluster>/<branch>`.
const LOG_SETTING: &str = "lakebase.log";

/// What all cores of a process share for letting followers in.
pub struct Admission {
    tls: Option<Tls>,
    users_file: Option<PathBuf>,
    pub(super) limits: SlotLimits,
    pub(super) metrics: FollowerMetrics,
    notices: Notices,
    /// Makes up verifiers for users that do not exist.
    mock_secret: [u8; 32],
}

/// A follower that was let in.
pub struct Admitted {
    pub(super) connection: Connection,
    pub(super) messages: MessageReader,
    /// The log that it wants; the core that owns it must serve it.
    pub log: LogId,
    /// Its user, or the member in its certificate.
    pub name: String,
    pub(super) application: String,
}

/// A follower between two cores.
pub struct AdmittedDetached {
    connection: Detached,
    messages: MessageReader,
    /// The log that it wants.
    pub log: LogId,
    name: String,
    application: String,
}

impl Admitted {
    /// Takes the follower off this core.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn detach(self) -> std::io::Result<AdmittedDetached> {
        let Admitted { connection, messages, log, name, application } = self;
        Ok(AdmittedDetached { connection: connection.detach()?, messages, log, name, application })
    }
}

impl AdmittedDetached {
    /// The follower, on the core that calls this.
    ///
    /// # Errors
    /// The driver refuses the connection.
    pub fn attach(self) -> std::io::Result<Admitted> {
        let AdmittedDetached { connection, messages, log, name, application } = self;
        Ok(Admitted { connection: connection.attach()?, messages, log, name, application })
    }
}

/// Why a login does not go on.
enum Refusal {
    /// The client is to be told.
    Told(ErrorReply),
    /// Nothing can be said to it any more.
    Broken(SessionError),
    /// It left by itself, or asked for nothing that is served.
    Left,
}

impl Refusal {
    fn told(code: &'static str, message: impl Into<String>) -> Self {
        Refusal::Told(ErrorReply::fatal(code, message))
    }
}

impl From<std::io::Error> for Refusal {
    fn from(error: std::io::Error) -> Self {
        Refusal::Broken(error.into())
    }
}

impl From<ProtocolError> for Refusal {
    fn from(error: ProtocolError) -> Self {
        Refusal::told(sqlstate::PROTOCOL_VIOLATION, error.to_string())
    }
}

impl From<ScramError> for Refusal {
    fn from(error: ScramError) -> Self {
        Refusal::told(sqlstate::PROTOCOL_VIOLATION, error.to_string())
    }
}

/// A connection during the login.
struct Login {
    connection: Connection,
    messages: MessageReader,
    /// What the port shows, once encrypted.
    tls: Option<FollowerTls>,
}

/// What the startup packet asks for.
struct Wish {
    startup: Startup,
    /// User name without the log that may be part of it.
    user: String,
    /// An error is told only to someone who may follow: strangers shall not learn which logs there are.
    log: Result<LogId, ErrorReply>,
}

impl Admission {
    /// What followers are let in by: certificates of `tls`, and verifiers in `users_file`. Without either (TLS switched off
    /// for development) everyone is.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn new(
        tls: Option<Tls>,
        users_file: Option<PathBuf>,
        limits: SlotLimits,
        metrics: FollowerMetrics,
    ) -> std::io::Result<Arc<Self>> {
        let mut mock_secret = [0; 32];
        getrandom::fill(&mut mock_secret).map_err(|error| std::io::Error::other(error.to_string()))?;
        Ok(Arc::new(Self { tls, users_file, limits, metrics, notices: Notices::default(), mock_secret }))
    }

    /// Whether a problem was not logged lately.
    pub(super) fn is_new(&self, problem: &str) -> bool {
        self.notices.is_new(problem, driver::now())
    }

    /// Runs a login to its end. A refusal is told to the client, and logged once for each of them and cause.
    pub(super) async fn admit(
        &self,
        connection: Connection,
        logs: impl AsyncFnOnce() -> Vec<LogId>,
        has_place: bool,
    ) -> Option<Admitted> {
        let mut who =
            connection.peer_address().map_or_else(|_| "unknown".to_owned(), |address| address.ip().to_string());
        let result = driver::timeout(LOGIN_LIMIT, self.log_in(connection, logs, has_place, &mut who)).await;
        let error = match result {
            Some(Ok(admitted)) => return Some(admitted),
            Some(Err(Refusal::Left)) => return None,
            Some(Err(Refusal::Told(reply))) => SessionError::Refused(reply.message),
            Some(Err(Refusal::Broken(error))) => error,
            None => SessionError::Refused(format!("no login within {LOGIN_LIMIT:?}")),
        };
        self.metrics.refused.inc();
        if self.is_new(&format!("follower {who}: {error}")) {
            tracing::warn!(follower = who, %error, "follower was not let in");
        }
        None
    }

    async fn log_in(
        &self,
        connection: Connection,
        logs: impl AsyncFnOnce() -> Vec<LogId>,
        has_place: bool,
        who: &mut String,
    ) -> Result<Admitted, Refusal> {
        let login = Login { connection, messages: MessageReader::new(), tls: None };
        let (mut login, startup) = login.startup(self.tls.as_ref()).await?;
        if let Some(user) = startup.parameter("user") {
            *who = format!("{user} at {who}");
        }
        let result = async {
            if !has_place {
                return Err(Refusal::told(sqlstate::TOO_MANY_CONNECTIONS, "sorry, too many followers already"));
            }
            let wish = wish(startup, logs).await?;
            let name = self.authenticate(&mut login, &wish).await?;
            let application = wish.startup.parameter("application_name").unwrap_or_default().to_owned();
            Ok((wish.log.map_err(Refusal::Told)?, name, application))
        };
        match result.await {
            Ok((log, name, application)) => {
                Ok(Admitted { connection: login.connection, messages: login.messages, log, name, application })
            }
            Err(refusal) => Err(login.refuse(refusal).await),
        }
    }

    /// Checks who the client is; returns the name to call it by.
    async fn authenticate(&self, login: &mut Login, wish: &Wish) -> Result<String, Refusal> {
        let unknown: Vec<&str> = wish.startup.unknown_extensions().collect();
        if wish.startup.minor > 0 || !unknown.is_empty() {
            let mut reply = Reply::new();
            reply.negotiate_version(unknown.into_iter());
            login.send(reply).await?;
        }
        if self.tls.is_some() && login.tls.is_none() {
            let reply = ErrorReply::fatal(sqlstate::INVALID_AUTHORIZATION, "connections without TLS are not let in")
                .with_detail("Set sslmode to require or better verify-full.");
            return Err(Refusal::Told(reply));
        }
        let certified = login.connection.peer_certificate().map(|certificate| {
            let peer = peer_of(&certificate).map_err(NotAllowed::from)?;
            let cluster = wish.log.as_ref().map_or(peer.cluster, |log| log.cluster);
            peer.authorize(Call::Replicate, cluster).map(|()| peer)
        });
        if let Some(Ok(peer)) = certified {
            return Ok(peer.name);
        }
        let Some(users_file) = &self.users_file else {
            return match certified {
                // TLS is off by the development flag, and so is the check of who is there.
                None if self.tls.is_none() => Ok(wish.user.clone()),
                None | Some(Ok(_)) => Err(Refusal::told(
                    sqlstate::INVALID_AUTHORIZATION,
                    "a client certificate is required: no users file is configured for passwords",
                )),
                Some(Err(why)) => Err(Refusal::told(sqlstate::INVALID_AUTHORIZATION, why.to_string())),
            };
        };
        let (path, user) = (users_file.clone(), wish.user.clone());
        let found = driver::unblock(move || users::find(&path, &user)).await;
        let verifier = match found {
            Ok(verifier) => verifier,
            Err(error) => {
                // The client is not told what is wrong with our files: to it, it is a wrong password.
                if self.is_new(&format!("users file: {error}")) {
                    tracing::error!(%error, "the users file of followers cannot be used");
                }
                None
            }
        };
        let verifier = verifier.unwrap_or_else(|| Verifier::mock(&wish.user, &self.mock_secret));
        login.scram(verifier, &wish.user).await?;
        Ok(wish.user.clone())
    }
}

/// Which log the client wants, by the first of: the setting in `options`, the part of the user name behind `@`, the only
/// log of the process.
async fn wish(startup: Startup, logs: impl AsyncFnOnce() -> Vec<LogId>) -> Result<Wish, Refusal> {
    let Some(name) = startup.parameter("user").filter(|name| !name.is_empty()) else {
        return Err(Refusal::told(sqlstate::INVALID_AUTHORIZATION, "no user name specified in startup packet"));
    };
    if !startup.is_physical_replication() {
        return Err(Refusal::Told(
            ErrorReply::fatal(sqlstate::FEATURE_NOT_SUPPORTED, "a safekeeper serves physical replication only")
                .with_detail("Connect with replication=true, as standbys and pg_receivewal do."),
        ));
    }
    let (user, in_name) = match name.split_once('@') {
        Some((user, log)) => (user.to_owned(), Some(log.to_owned())),
        None => (name.to_owned(), None),
    };
    let in_options = startup.parameter("options").and_then(|options| options_setting(options, LOG_SETTING));
    let log = choose(in_options.or(in_name), &logs().await);
    Ok(Wish { startup, user, log })
}

fn choose(named: Option<String>, logs: &[LogId]) -> Result<LogId, ErrorReply> {
    let error = |message: String| ErrorReply::fatal(sqlstate::INVALID_CATALOG_NAME, message);
    match (named, logs) {
        (Some(text), _) => match text.parse() {
            Ok(log) if logs.contains(&log) => Ok(log),
            Ok(log) => Err(error(format!("log \"{log}\" does not exist here"))),
            Err(_) => Err(error(format!("\"{text}\" does not name a log: expected <cluster>/<branch>"))),
        },
        (None, [log]) => Ok(*log),
        (None, []) => Err(error("this safekeeper has no log".to_owned())),
        (None, _) => {
            let detail =
                format!("Add options='-c {LOG_SETTING}=<cluster>/<branch>', or user=<name>@<cluster>/<branch>.");
            Err(error("this safekeeper has more than one log: say which to follow".to_owned()).with_detail(detail))
        }
    }
}

impl Login {
    /// Reads up to the startup packet, and encrypts on request.
    async fn startup(mut self, tls: Option<&Tls>) -> Result<(Login, Startup), Refusal> {
        // Each request may come once: `ProcessStartupPacket` does not answer them again either.
        let (mut asked_tls, mut asked_gss) = (false, false);
        loop {
            match self.next_startup().await {
                Ok(StartupMessage::SslRequest) if !asked_tls && self.tls.is_none() => {
                    asked_tls = true;
                    match tls {
                        Some(tls) => self = self.encrypt(tls.follower()).await?,
                        None => self.send_bytes(b"N".to_vec()).await?,
                    }
                }
                Ok(StartupMessage::GssEncryptionRequest) if !asked_gss && self.tls.is_none() => {
                    asked_gss = true;
                    self.send_bytes(b"N".to_vec()).await?;
                }
                Ok(StartupMessage::Startup(startup)) => return Ok((self, startup)),
                Ok(StartupMessage::CancelRequest) => return Err(Refusal::Left),
                Ok(_) => {
                    let refusal = Refusal::told(sqlstate::PROTOCOL_VIOLATION, "encryption was negotiated already");
                    return Err(self.refuse(refusal).await);
                }
                Err(refusal) => return Err(self.refuse(refusal).await),
            }
        }
    }

    /// Tells the client why it is not let in.
    async fn refuse(self, refusal: Refusal) -> Refusal {
        if let Refusal::Told(reply) = &refusal {
            let (mut reader, mut writer) = self.connection.into_split();
            inbound::refuse(&mut reader, &mut writer, reply).await;
        }
        refusal
    }

    async fn encrypt(mut self, tls: FollowerTls) -> Result<Login, Refusal> {
        // Bytes behind the request were sent before the encryption, so they need not come from the client
        // (CVE-2021-23214).
        if !self.messages.is_empty() {
            let refusal = Refusal::told(sqlstate::PROTOCOL_VIOLATION, "received unencrypted data after SSL request");
            return Err(self.refuse(refusal).await);
        }
        self.send_bytes(b"S".to_vec()).await?;
        let connection = self.connection.upgrade_server(tls.config.clone()).await?;
        Ok(Login { connection, messages: self.messages, tls: Some(tls) })
    }

    async fn next_startup(&mut self) -> Result<StartupMessage, Refusal> {
        loop {
            if let Some(message) = self.messages.next_startup()? {
                return Ok(message);
            }
            self.receive().await?;
        }
    }

    async fn receive(&mut self) -> Result<(), Refusal> {
        let (result, buffer) = self.connection.read(self.messages.take_buffer()).await;
        self.messages.return_buffer(buffer);
        // Port checks connect and leave without a word, which is nothing to write about.
        if result? == 0 { Err(Refusal::Left) } else { Ok(()) }
    }

    async fn send(&mut self, reply: Reply) -> Result<(), Refusal> {
        self.send_bytes(reply.into_bytes()).await
    }

    async fn send_bytes(&mut self, bytes: Vec<u8>) -> Result<(), Refusal> {
        let (result, _) = self.connection.write_all(bytes).await;
        Ok(result?)
    }

    async fn scram(&mut self, verifier: Verifier, user: &str) -> Result<(), Refusal> {
        let hash = self.tls.as_ref().and_then(|tls| tls.certificate_hash.clone());
        let (mechanisms, binding): (&[&str], _) = match &hash {
            Some(hash) => (&[scram::MECHANISM_PLUS, scram::MECHANISM], ChannelBinding::Offered(hash)),
            None => (&[scram::MECHANISM], ChannelBinding::None),
        };
        let mut reply = Reply::new();
        reply.authentication_sasl(mechanisms);
        self.send(reply).await?;

        let mut nonce = [0; scram::NONCE_BYTES];
        getrandom::fill(&mut nonce).map_err(|error| std::io::Error::other(error.to_string()))?;
        let answer = self.authentication_message().await?;
        let (mechanism, first) = scram::initial_response(&answer)?;
        let (exchange, challenge) = scram::start(mechanism, first, verifier, &nonce, binding)?;
        let mut reply = Reply::new();
        reply.authentication_sasl_continue(&challenge);
        self.send(reply).await?;

        let answer = self.authentication_message().await?;
        let proof = exchange.finish(&answer).map_err(|error| match error {
            ScramError::WrongPassword => {
                Refusal::told(sqlstate::INVALID_PASSWORD, format!("password authentication failed for user \"{user}\""))
            }
            broken => broken.into(),
        })?;
        let mut reply = Reply::new();
        reply.authentication_sasl_final(&proof);
        self.send(reply).await
    }

    async fn authentication_message(&mut self) -> Result<Vec<u8>, Refusal> {
        while !self.messages.is_message_ready() {
            self.receive().await?;
        }
        match self.messages.next()? {
            Some(FrontendMessage::Authentication(data)) => Ok(data.to_vec()),
            // A client that asks for the password first connects without, and leaves here.
            Some(FrontendMessage::Terminate) => Err(Refusal::Left),
            _ => Err(Refusal::told(sqlstate::PROTOCOL_VIOLATION, "expected SASL response")),
        }
    }
}
