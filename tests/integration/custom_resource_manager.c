/* A resource manager of an extension, with a function that writes one record of it: for test_extensions.py. */
#include "postgres.h"

#include "access/xlog.h"
#include "access/xlog_internal.h"
#include "access/xloginsert.h"
#include "fmgr.h"

PG_MODULE_MAGIC;

static void
note_redo(XLogReaderState *record)
{
}

static void
note_desc(StringInfo buf, XLogReaderState *record)
{
}

static const char *
note_identify(uint8 info)
{
	return "NOTE";
}

static const RmgrData note = {
	.rm_name = "note",
	.rm_redo = note_redo,
	.rm_desc = note_desc,
	.rm_identify = note_identify,
};

void _PG_init(void);

void
_PG_init(void)
{
	RegisterCustomRmgr(RM_EXPERIMENTAL_ID, &note);
}

PG_FUNCTION_INFO_V1(write_note);

Datum
write_note(PG_FUNCTION_ARGS)
{
	XLogRecPtr	lsn;

	XLogBeginInsert();
	XLogRegisterData("note", 4);
	lsn = XLogInsert(RM_EXPERIMENTAL_ID, 0);
	XLogFlush(lsn);
	PG_RETURN_VOID();
}
